"On an NVIDIA GPU (skipped without one): the scans by PyTorch and by mamba_ssm, converted models, generation, and training are what they are on a CPU."
import copy, functools, os
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts: without it its matrix products are not repeatable

import pytest, torch
from accelerate.state import AcceleratorState
from transformers import AutoModel, AutoModelForCausalLM, RobertaConfig, RobertaForSequenceClassification, TrainingArguments

from cald import ops
from cald.convert import convert
from cald.distill import Distiller,find_snapshots
from cald.guidance import Hybrid,Target,Trajectory,Unguided,Waypoint
from cald.pretrained import shipped
from test_mixers import SCANS, halved, rms

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason='no NVIDIA GPU'), pytest.mark.xdist_group('cuda')]

@pytest.fixture(autouse=True)
def exact(monkeypatch):
    "Convolutions in float32, which PyTorch leaves to TF32"
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    torch.manual_seed(0)

@pytest.fixture(params=['torch','mamba_ssm'])
def by(request, monkeypatch):
    "The backend"
    if request.param=='torch': monkeypatch.setattr(ops, 'mamba_ssm_kernels', lambda: None)
    elif ops.mamba_ssm_kernels() is None: pytest.skip('mamba_ssm is not installed')
    return request.param

def near(by, mamba2, otherwise):
    "The error allowed: mamba_ssm's Mamba2 multiplies in TF32, with 10 bits of each factor, where all else here has the 23 of float32"
    return 3e-3 if mamba2 and by=='mamba_ssm' else otherwise

# scans --------------------------------------------------------------------------------------------------------------------------------

SIZES = dict(ssd=dict(h=4, p=32, g=2, n=32), scan=dict(d=64, n=16))

@pytest.mark.parametrize('name', SCANS)
@pytest.mark.parametrize('l', (1,63,64,65,257,1000))
def test_a_scan_is_the_recurrence_in_float64(name, l, by):
    fast,slow,make,_ = SCANS[name]
    a64 = [t.requires_grad_() for t in make(l=l, dt=4, **SIZES[name])]
    a = [t.detach().float().cuda().requires_grad_() for t in a64]
    assert ops.backend('cuda')==by
    (y,S),(y64,S64) = fast(*a),slow(*a64)
    weights = torch.randn_like(y64)
    found,wanted = (torch.autograd.grad((out*w).sum(), wrt) for out,w,wrt in ((y,weights.float().cuda(),a),(y64,weights,a64)))
    eps = near(by, name=='ssd', 1e-5)
    assert rms(y.cpu(), y64)<eps and rms(S.cpu(), S64)<eps
    for g,g64 in zip(found, wanted): assert rms(g.cpu(), g64)<2*eps

@pytest.mark.parametrize('name', SCANS)
@pytest.mark.parametrize('kind', (torch.bfloat16,torch.float16), ids=str)
def test_a_scan_of_16_bits_computes_in_32(name, kind, by):
    fast,_,make,_ = SCANS[name]
    a = [t.to('cuda', kind) for t in make(l=200, dt=4, **SIZES[name])]
    (y,S),(y32,S32) = fast(*a),fast(*(t.float() for t in a))
    assert y.dtype==kind and S.dtype==torch.float32
    assert torch.equal(y, y32.to(kind)) and torch.equal(S, S32)

@pytest.mark.parametrize('name', SCANS)
def test_a_scan_goes_on_from_a_state(name, by):
    fast,_,make,_ = SCANS[name]
    a = [t.float().cuda() for t in make(l=200, dt=4, **SIZES[name])]
    (y,S),(y1,S1) = fast(*a),fast(*halved(a, slice(77)))
    y2,S2 = fast(*halved(a, slice(77,None)), S1)
    eps = near(by, name=='ssd', 1e-5)
    assert rms(torch.cat([y1,y2], 1).cpu(), y.double().cpu())<eps and rms(S2.cpu(), S.double().cpu())<eps

# models -------------------------------------------------------------------------------------------------------------------------------

FAMILIES = {'roberta-demo':('linformer',dict(k=16)), 'gpt_neox-demo':('mamba',{}), 'wav2vec2-demo':('mamba2',dict(d_state=32, headdim=32))}
families = pytest.mark.parametrize('family', FAMILIES)

@functools.cache
def source(family): return AutoModel.from_pretrained(shipped(family)).eval().requires_grad_(False)

@functools.cache
def student(family):
    to,args = FAMILIES[family]
    return convert(source(family), to=to, seed=0, **args).eval().requires_grad_(False)

def batch(family, lengths=(90,61)):
    "Inputs of two lengths with the padding behind them"
    if family.startswith('wav2vec2'): lengths = [320*n+80 for n in lengths]
    mask = torch.stack([torch.arange(max(lengths))<n for n in lengths]).long()
    if family.startswith('wav2vec2'): return dict(input_values=torch.randn(mask.shape)*mask, attention_mask=mask)
    return dict(input_ids=torch.randint(5, source(family).config.vocab_size, mask.shape)*mask+source(family).config.pad_token_id*(1-mask), attention_mask=mask)

def on_gpu(x): return {k: v.cuda() for k,v in x.items()}

@families
def test_a_converted_model_computes_what_it_does_on_a_cpu(family, by):
    m,x = student(family),batch(family)
    want = copy.deepcopy(m).double()(**{k: v.double() if v.is_floating_point() else v for k,v in x.items()}, output_hidden_states=True).hidden_states
    got = copy.deepcopy(m).cuda()(**on_gpu(x), output_hidden_states=True).hidden_states
    assert len(got)==len(want)>=4
    for g,w in zip(got, want): assert rms(g.cpu(), w)<near(by, family=='wav2vec2-demo', 1e-4)

@families
def test_a_model_is_converted_on_the_gpu(family):
    to,args = FAMILIES[family]
    there = convert(copy.deepcopy(source(family)).cuda(), to=to, seed=0, **args)
    for (n,p),(n_cpu,q) in zip(there.state_dict().items(), student(family).state_dict().items(), strict=True):
        assert n==n_cpu and p.device.type=='cuda' and torch.equal(p.cpu(), q), n

@families
def test_pads_change_nothing(family, by):
    m,x = copy.deepcopy(student(family)).cuda(),on_gpu(batch(family))
    both = m(**x).last_hidden_state
    for i,row in enumerate(both):
        n = int(x['attention_mask'][i].sum())
        alone = m(**{k: v[i:i+1,:n] for k,v in x.items()}).last_hidden_state[0]
        assert rms(row[:len(alone)].cpu(), alone.double().cpu())<near(by, family=='wav2vec2-demo', 1e-4)

@pytest.mark.parametrize('to', ('mamba','mamba2'))
def test_a_cache_changes_no_token(to, by):
    m = convert(AutoModelForCausalLM.from_pretrained(shipped('gpt_neox-demo')), to=to, seed=0).eval().cuda()
    prompt = torch.randint(5, m.config.vocab_size, (2,30), device='cuda')
    def text(**kw): return m.generate(prompt, max_new_tokens=40, do_sample=False, **kw)
    cached,whole = text(),text(use_cache=False)
    assert cached.shape==(2,70) and torch.equal(cached, whole)

# training -----------------------------------------------------------------------------------------------------------------------------

def classifier(seed, dropout=0.):
    torch.manual_seed(seed)
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=40, pad_token_id=1, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout))

def linear(seed, dropout=0.): return convert(classifier(seed, dropout), to='linformer', k=4, max_length=32, seed=seed)

def rows(n=21):
    g = torch.Generator().manual_seed(0)
    return [dict(input_ids=torch.randint(2, 50, (5+i%20,), generator=g), labels=i%2) for i in range(n)]

def pad(batch):
    ids = torch.nn.utils.rnn.pad_sequence([r['input_ids'] for r in batch], batch_first=True, padding_value=1)
    return dict(input_ids=ids, attention_mask=(ids!=1).long(), labels=torch.tensor([r['labels'] for r in batch]))

def distiller(folder, guidance, model, **kw):
    args = TrainingArguments(str(folder), **{**dict(max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=3e-3, logging_steps=1,
                                                    save_strategy='no', seed=1), **kw})
    return Distiller(model, args, rows(), guidance, data_collator=pad, progress='none')

@pytest.fixture(scope='module')
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp('waypoints')
    for s in (2,5,9): classifier(s).save_pretrained(folder/f'snapshot-{s}')
    return find_snapshots(folder)

MODES = dict(unguided=lambda s: Unguided(), target=lambda s: Target(classifier(3)), trajectory=lambda s: Trajectory(classifier(4), lr=1e-3, every=2),
             waypoint=lambda s: Waypoint(s), hybrid=lambda s: Hybrid(Target(classifier(3)), until=5))
modes = pytest.mark.parametrize('mode', MODES)

def losses(d): return [[l[k] for k in sorted(l) if k.startswith('loss')] for l in d.state.log_history if 'loss' in l]

@modes
def test_training_goes_as_on_a_cpu(mode, snapshots, tmp_path):
    done = []
    for device in ('cpu','cuda'):
        AcceleratorState._reset_state(True) # else the second run is on the device of the first
        done.append(distiller(tmp_path/device, MODES[mode](snapshots), linear(0), use_cpu=device=='cpu'))
        done[-1].train()
    here,there = done
    AcceleratorState._reset_state(True)
    assert next(there.model.parameters()).is_cuda and len(losses(here))==8
    for a,b in zip(losses(here), losses(there), strict=True): torch.testing.assert_close(torch.tensor(b), torch.tensor(a), rtol=1e-3, atol=1e-4)

@modes
def test_bf16_and_fp16_train(mode, snapshots, tmp_path):
    for kind in ('bf16','fp16'):
        d = distiller(tmp_path/kind, MODES[mode](snapshots), linear(0), **{kind: True})
        d.train()
        assert all(p.dtype==torch.float32 and p.isfinite().all() for p in d.model.parameters())
        exact = distiller(tmp_path/f'{kind}-exact', MODES[mode](snapshots), linear(0))
        exact.train()
        torch.testing.assert_close(torch.tensor(losses(d)[0]), torch.tensor(losses(exact)[0]), rtol=.03, atol=.01)

@pytest.fixture
def repeatable():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

@modes
def test_a_resumed_run_is_the_uninterrupted_one(mode, snapshots, tmp_path, repeatable):
    "With dropout, and with PyTorch's repeatable algorithms"
    straight = distiller(tmp_path/'run', MODES[mode](snapshots), linear(0, .1), save_strategy='steps', save_steps=4)
    straight.train()
    torch.rand(13, device='cuda')
    resumed = distiller(tmp_path/'again', MODES[mode](snapshots), linear(7, .1))
    resumed.train(tmp_path/'run'/'checkpoint-4')
    a,b = (d.model.state_dict() for d in (straight,resumed))
    for n in a: assert torch.equal(a[n], b[n]), n
    assert losses(straight)==losses(resumed)
