"Conversion: what is kept to the bit, what comes back from disk, and all that must be refused."
import copy, json, os, re, subprocess, sys
from pathlib import Path

import pytest, torch, transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (AutoConfig, AutoModel, AutoModelForAudioClassification, AutoModelForCausalLM, AutoModelForCTC,
    AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, GPTNeoXConfig, GPTNeoXForCausalLM,
    BertForNextSentencePrediction, GPTNeoXModel, RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification, RobertaModel,
    Trainer, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForCTC, Wav2Vec2ForSequenceClassification, Wav2Vec2Model)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

import cald
from cald.convert import convert,families,report,transfer
from cald.models import FAMILIES,register_head

root = Path(__file__).parents[1]
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

size = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, initializer_range=0.2)
tokens = dict(size, vocab_size=60, max_position_embeddings=44)
w2v = dict(size, vocab_size=12, conv_dim=(16,)*7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, classifier_proj_size=16,
           num_labels=3)
stable = dict(w2v, do_stable_layer_norm=True, feat_extract_norm='layer')
sources = dict(
    ctc=(Wav2Vec2ForCTC, Wav2Vec2Config, stable, AutoModelForCTC),
    audio=(Wav2Vec2ForSequenceClassification, Wav2Vec2Config, dict(w2v, feat_extract_norm='layer'), AutoModelForAudioClassification),
    speech=(Wav2Vec2Model, Wav2Vec2Config, w2v, AutoModel),
    text=(RobertaForSequenceClassification, RobertaConfig, dict(tokens, num_labels=3), AutoModelForSequenceClassification),
    mlm=(RobertaForMaskedLM, RobertaConfig, tokens, AutoModelForMaskedLM),
    body=(RobertaModel, RobertaConfig, tokens, AutoModel),
    bert=(BertForMaskedLM, BertConfig, tokens, AutoModelForMaskedLM),
    lm=(GPTNeoXForCausalLM, GPTNeoXConfig, tokens, AutoModelForCausalLM),
    neox=(GPTNeoXModel, GPTNeoXConfig, tokens, AutoModel))
mixers = dict(mamba2=dict(d_state=8), mamba=dict(d_state=4), linformer=dict(k=6, max_length=44))
pairs = [(s,to) for s in sources for to in mixers if not (to=='linformer' and s in ('lm','neox'))]

def model(name, **changed):
    cls,config,args,_ = sources[name]
    torch.manual_seed(0)
    return cls(config(**{**args, **changed})).eval()

def student(name, to='mamba2', m=None, seed=0, **args): return convert(m or model(name), to=to, seed=seed, **{**mixers[to], **args})

def inputs(name, lengths=(30,19), left=False):
    g = torch.Generator().manual_seed(1)
    n = max(lengths)
    if sources[name][1] is Wav2Vec2Config: x,n,lengths = torch.randn(len(lengths), 320*n, generator=g),320*n,[320*l for l in lengths]
    else: x = torch.randint(3, 60, (len(lengths),n), generator=g)
    mask = (torch.arange(n) < torch.tensor(lengths)[:,None]).long()
    return {('input_values' if x.is_floating_point() else 'input_ids'):x, 'attention_mask':mask.flip(1) if left else mask}

@torch.no_grad()
def run(m, x): return m(**x, output_hidden_states=True)

def tensors(out): return [out[0], *out.hidden_states]
def everything(m): return {**dict(m.named_parameters(remove_duplicate=False)), **dict(m.named_buffers(remove_duplicate=False))}
def copies(m): return {n: t.detach().clone() for n,t in everything(m).items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype==b[n].dtype for n in a)

# ---- what is kept

@pytest.mark.parametrize('name', sources)
def test_identity_is_the_source_to_the_bit(name):
    m,x = model(name),inputs(name)
    s = convert(m, to='identity')
    assert same(copies(m), copies(s)) and all(map(torch.equal, tensors(run(m, x)), tensors(run(s, x))))
    assert not {t.data_ptr() for t in everything(m).values()} & {t.data_ptr() for t in everything(s).values()}

@pytest.mark.parametrize('name,to', pairs)
def test_all_but_the_attention_is_the_source_to_the_bit(name, to):
    m = model(name)
    for i,p in enumerate(m.parameters()): p.requires_grad_(i%3>0)
    before = copies(m)
    s = student(name, to, m)
    kept,gone = [n for n in everything(s) if n in before],[n for n in before if n not in everything(s)]
    assert all(torch.equal(before[n], everything(s)[n]) for n in kept) and same(before, copies(m))
    assert all(everything(m)[n].requires_grad==everything(s)[n].requires_grad for n in kept)
    assert set(everything(s))-set(before)==set(s.new_weights()) and all('attention' in n for n in gone)
    assert (not gone) if to=='linformer' else len(gone)==3*len([n for n in gone if '.0.' in n])>0
    assert len({id(p) for p in everything(m).values()})==len({id(everything(s)[n]) for n in kept})+len(gone)   # ties are ties

def test_layers_that_are_not_named_keep_their_attention():
    m,x = model('ctc'),inputs('ctc')
    s = student('ctc', m=m, layers=[2])
    a,b = run(m, x).hidden_states,run(s, x).hidden_states
    assert list(s.replacements)==['wav2vec2.encoder.layers.2.attention'] and [torch.equal(*t) for t in zip(a, b)]==[True,True,True,False]
    assert s.config.cald['layers']==[2]

def test_a_seed_fixes_the_student_and_nothing_else():
    m = model('ctc')
    for seed in (0,None):
        torch.manual_seed(3)
        state = torch.get_rng_state()
        a = student('ctc', m=m, seed=seed)
        assert torch.equal(state, torch.get_rng_state())==(seed is not None)
    torch.manual_seed(3)
    assert same(copies(a), copies(student('ctc', m=m, seed=None)))
    assert same(copies(student('ctc', m=m)), copies(student('ctc', m=m)))
    assert not same(copies(student('ctc', m=m)), copies(student('ctc', m=m, seed=1)))

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float64])
def test_dtype_and_mode_follow_the_source(dtype):
    m = model('ctc').to(dtype).train()
    s = student('ctc', m=m)
    assert {t.dtype for t in everything(s).values() if t.is_floating_point()}=={dtype} and s.training and not student('ctc').training

def test_attention_implementation_follows_the_source():
    m = model('text')
    m.set_attn_implementation('eager')
    s = student('text', m=m, layers=[0])
    assert s.config._attn_implementation=='eager'
    eager = run(s, inputs('text'))[0]
    s.set_attn_implementation('sdpa')
    assert s.config._attn_implementation=='sdpa' and torch.allclose(run(s, inputs('text'))[0], eager, atol=1e-5)

def test_a_source_that_its_configuration_does_not_describe_is_refused():
    m = model('ctc')
    m.config.mask_time_prob = 0.
    with pytest.raises(ValueError, match='masked_spec_embed'): student('ctc', m=m)
    m = model('lm')
    m.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match='extra.weight'): student('lm', m=m)
    m = model('lm')
    m.lm_head = nn.Linear(32, 61, bias=False)
    with pytest.raises(ValueError, match='lm_head.weight'): student('lm', m=m)

def test_mixers_start_as_mixers(tmp_path):
    s = student('ctc', d_state=8, headdim=4)
    fresh = type(s)(s.config)                           # from the configuration alone
    for m in (s,fresh):
        before = copies(m)
        m.init_weights()
        assert all(torch.equal(before[n], m.get_parameter(n)) for n in m.new_weights())
        for n in m.new_weights():
            p = m.get_parameter(n)
            if n.endswith('A_log'): assert 1<=p.exp().min() and p.exp().max()<=16 and p.unique().numel()==p.numel()
            if n.endswith('dt_bias'): assert 0.00099<nn.functional.softplus(p).min() and nn.functional.softplus(p).max()<0.1001
            if n.endswith('.D') or n.endswith('norm.weight'): assert (p==1).all()
            if n.endswith('in_proj.weight'): assert 0.9*32**-0.5<p.abs().max()<=32**-0.5

def test_paper_sizes_are_reachable():
    large = dict(size, hidden_size=2048, num_hidden_layers=1, num_attention_heads=8)
    s = convert(GPTNeoXForCausalLM(GPTNeoXConfig(**large, vocab_size=8)).bfloat16(), to='mamba', d_inner=5120, dt_rank=160)
    mixer = s.gpt_neox.layers[0].attention.mixer
    assert mixer.dt_proj.weight.shape==(5120,160) and mixer.in_proj.weight.shape==(10240,2048)
    assert round(sum(p.numel() for p in mixer.parameters())/1e6, 1)==33.4
    large = dict(stable, hidden_size=1024, num_hidden_layers=1, num_attention_heads=16)
    mixer = convert(Wav2Vec2Model(Wav2Vec2Config(**large))).encoder.layers[0].attention.mixer
    assert (mixer.fw.nheads,mixer.fw.d_state,mixer.fw.d_inner)==(16,128,1024)
    assert round(sum(p.numel() for p in mixer.parameters())/1e6, 2)==6.86

# ---- inside a batch, and as transformers uses it

@pytest.mark.parametrize('attention', ['sdpa','eager'])
@pytest.mark.parametrize('name,to', [p for p in pairs if p[0]!='speech']) # group norm takes the padding in before the encoder
def test_padding_changes_nothing(name, to, attention):
    s = student(name, to)
    s.config._attn_implementation = attention
    for left in [False]+[True]*(name in ('lm','neox')):
        x = inputs(name, (30,19,7), left)
        key = next(k for k in x if k!='attention_mask')
        noisy = {**x, key:torch.where(x['attention_mask']>0, x[key], torch.full_like(x[key], 7))}
        if left: x['position_ids'] = noisy['position_ids'] = (x['attention_mask'].cumsum(1)-1).clamp(min=0)
        both,noise = run(s, x)[0],run(s, noisy)[0]
        for i in range(3):
            real = x['attention_mask'][i].bool()
            one = run(s, {key:x[key][i:i+1,real]})[0][0]
            n = len(one)
            cut = (lambda t: t) if both.ndim==2 else (lambda t: t[-n:]) if left else (lambda t: t[:n])
            assert torch.allclose(cut(both[i]), one, atol=3e-5), (left,i)
            if name!='ctc' and name!='audio': assert torch.equal(cut(noise[i]), cut(both[i])), (left,i)

@pytest.mark.parametrize('name,to', [p for p in pairs if p[0] in ('ctc','text','lm')])
def test_hidden_states_are_those_of_the_layers(name, to):
    s,x,seen = student(name, to, layers=[0,2]),inputs(name),[]
    layers = s.base_model.get_submodule(FAMILIES[s.config.cald['family']].layers)
    for l in layers: l.register_forward_hook(lambda m,a,o: seen.append(o[0] if isinstance(o, tuple) else o))
    hidden = run(s, x).hidden_states
    assert len(hidden)==4 and all(map(torch.equal, hidden[1:3], seen[:2]))

def test_what_a_student_has_not_is_refused():
    s,x = student('lm', 'mamba'),inputs('lm')
    with pytest.raises(ValueError, match='no attention weights'): s(**x, output_attentions=True)
    two_texts = torch.cat([torch.arange(18),torch.arange(12)]).expand(2, -1)
    with pytest.raises(ValueError, match='packed'): s(x['input_ids'], position_ids=two_texts, use_cache=False)
    s.config._attn_implementation = 'eager'
    s.config.output_attentions = True
    with pytest.raises(ValueError, match='no attention weights'): s(**x)

@pytest.mark.parametrize('name,to', [('text','linformer'),('ctc','mamba2'),('lm','mamba')])
def test_the_layers_that_a_hybrid_keeps_return_their_attention_weights(name, to):
    m = model(name)
    m.set_attn_implementation('eager')
    x = inputs(name)
    kept,theirs = (net(**x, output_attentions=True).attentions for net in (student(name, to, m, layers=[1,2]),m))
    assert len(kept)==1 and torch.equal(kept[0], theirs[0])

@pytest.mark.parametrize('pads', ['100111011','001101000','111100000'])
def test_linformer_reads_tokens_as_if_no_pads_came_before_them(pads):
    r = next(iter(student('text', 'linformer').double().replacements.values()))
    x,mask = torch.randn(2, 9, 32, dtype=torch.float64),torch.tensor([[True]*9,[p=='1' for p in pads]])
    with torch.no_grad(): y,alone,whole = r(x, mask)[0],r(x[1:,mask[1]])[0],r(x[:1])[0]
    torch.testing.assert_close(y[1:,mask[1]], alone)
    torch.testing.assert_close(y[:1], whole)

# ---- graphs

@pytest.mark.parametrize('name,to,left', [('text','linformer',True),('mlm','mamba2',False),('lm','mamba',True)])
def test_a_model_is_one_graph(name, to, left):
    m,x = student(name, to, layers=[1]),inputs(name, (20,9), left)
    with torch.no_grad(): got,want = torch.compile(m, backend='eager', fullgraph=True)(**x)[0],m(**x)[0]
    kept = slice(None) if name=='text' else x['attention_mask'].bool()
    torch.testing.assert_close(got[kept], want[kept], rtol=1e-4, atol=1e-5)

def test_a_graph_refuses_packed_texts_when_it_runs():
    m,ids = student('lm', 'mamba2', layers=[1]),inputs('lm')['input_ids']
    one,two = (torch.cat([torch.arange(30-n),torch.arange(n)]).expand(2, -1) for n in (0,12))
    graph = torch.compile(m, backend='eager', fullgraph=True)
    graph(ids, position_ids=one, use_cache=False)
    with pytest.raises(RuntimeError, match='packed'): graph(ids, position_ids=two, use_cache=False)

@pytest.mark.parametrize('name,to', [('text','linformer'),('mlm','mamba2'),('lm','mamba2')])
def test_a_model_can_be_exported(name, to):
    m,x = student(name, to, layers=[1]),inputs(name, (20,9))
    if name=='lm': x['use_cache'] = False
    got = torch.export.export(m, (), x).module()(**x)
    with torch.no_grad(): torch.testing.assert_close(got[0], m(**x)[0], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('layers', [None,[0],[2]])
def test_generate_is_the_greedy_loop(layers, tmp_path):
    s = student('lm', 'mamba', layers=layers)
    s.save_pretrained(tmp_path)
    x,config = inputs('lm', (9,5), left=True),copy.deepcopy(s.config)
    config.use_cache = True
    for m in (s,AutoModelForCausalLM.from_pretrained(tmp_path),type(s)(config).eval()):
        assert m.config.use_cache is True and m.generation_config.use_cache is True
        m.generation_config.eos_token_id = None
        out = m.generate(**x, do_sample=False, pad_token_id=0, max_new_tokens=4)
        for i,n in enumerate((9,5)):
            ids = x['input_ids'][i:i+1,-n:]
            for _ in range(4): ids = torch.cat([ids, run(m, dict(input_ids=ids))[0][:,-1:].argmax(-1)], 1)
            assert torch.equal(out[i,-n-4:], ids[0])
        assert torch.equal(out, m.generate(**x, do_sample=False, pad_token_id=0, max_new_tokens=4, use_cache=False))

@pytest.mark.filterwarnings('ignore:.*gradient_checkpointing_enable')
@pytest.mark.parametrize('name,to', [('ctc','mamba2'),('text','linformer'),('lm','mamba')])
def test_every_weight_learns_with_and_without_checkpointing(name, to):
    off = dict(ctc=('hidden_dropout','activation_dropout','attention_dropout','feat_proj_dropout','final_dropout','layerdrop',
                    'mask_time_prob'),
               text=('hidden_dropout_prob','attention_probs_dropout_prob'), lm=())[name]
    off = dict.fromkeys(off, 0.)
    s,grads = student(name, to, model(name, **off)).train(),[]
    for _ in range(2):
        s.zero_grad()
        s(**inputs(name))[0].square().mean().backward()
        grads.append({n: p.grad for n,p in s.named_parameters()})
        s.gradient_checkpointing_enable()
    assert all(g is not None and g.abs().sum()>0 for n,g in grads[0].items() if n.endswith('weight') or n in s.new_weights())
    for n,g in grads[0].items(): assert torch.allclose(grads[1][n], g, rtol=1e-4, atol=1e-5*float(g.abs().max())), n

def test_a_copy_of_a_student_is_a_student():
    s = student('text', 'linformer', share='layer')
    c = copy.deepcopy(s)
    assert same(copies(s), copies(c)) and torch.equal(run(s, inputs('text'))[0], run(c, inputs('text'))[0])
    assert len({id(c.get_parameter(n)) for n in c.new_weights()})==1
    c.load_state_dict(student('text', 'linformer', share='layer', seed=1).state_dict())
    assert not torch.equal(run(s, inputs('text'))[0], run(c, inputs('text'))[0])

# ---- there and back

@pytest.mark.parametrize('name,to', pairs)
def test_a_saved_student_comes_back(name, to, tmp_path):
    s,auto,x = student(name, to, layers=[0,1]),sources[name][3],inputs(name)
    s.save_pretrained(tmp_path)
    back = auto.from_pretrained(tmp_path)
    assert type(back) is type(s) and back.config.cald==s.config.cald and same(copies(s), copies(back))
    assert all(map(torch.equal, tensors(run(s, x)), tensors(run(back, x))))
    back.save_pretrained(tmp_path/'again')
    assert [(tmp_path/f).read_bytes()==(tmp_path/'again'/f).read_bytes() for f in ('config.json','model.safetensors')]==[True,True]
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file()) in (['.json','.py','.safetensors'],['.json','.json','.py','.safetensors'])

@pytest.mark.parametrize('share', ['none','kv','layer'])
@pytest.mark.parametrize('name', ['text','ctc'])
def test_shared_matrices_come_back_shared(name, share, tmp_path):
    s = student(name, 'linformer', share=share, layers=[1,2])
    s.save_pretrained(tmp_path, max_shard_size='20KB')                 # in several files, too
    back = sources[name][3].from_pretrained(tmp_path)
    count = dict(none=4, kv=2, layer=1)[share]
    assert len(list(tmp_path.glob('*.safetensors')))>1 and same(copies(s), copies(back))
    for m in (s,back): assert len({id(m.get_parameter(n)) for n in m.new_weights()})==count
    back.get_parameter(back.new_weights()[0]).data.zero_()
    assert not any((s.get_parameter(n)==0).all() for n in s.new_weights())
    assert report(s).parameters.sum()==s.num_parameters()

def test_a_head_may_be_new_but_no_layer(tmp_path):
    s = student('mlm', 'mamba2')
    s.save_pretrained(tmp_path)
    c = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(c.get_parameter(n), s.get_parameter(n)) for n in s.new_weights())
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(run(body, inputs('mlm')).hidden_states[-1], run(s, inputs('mlm')).hidden_states[-1])

@pytest.mark.parametrize('name,to', [('ctc','mamba2'),('text','linformer'),('lm','mamba')])
def test_no_weight_of_a_layer_may_be_missing_or_unknown(name, to, tmp_path):
    s,auto = student(name, to, layers=[0,2]),sources[name][3]
    s.save_pretrained(tmp_path)
    file,config = tmp_path/'model.safetensors',json.loads((tmp_path/'config.json').read_text())
    whole = load_file(file)
    def refused(match, weights=whole, **cald):
        save_file(weights, file, metadata={'format':'pt'})
        (tmp_path/'config.json').write_text(json.dumps({**config, 'cald':{**config['cald'], **cald}}))
        with pytest.raises(ValueError, match=match): auto.from_pretrained(tmp_path)
    path = FAMILIES[s.config.cald['family']].layers
    for n in [n for n in whole if f'{path}.0.' in n or f'{path}.1.attention' in n][::2]:
        refused('1 missing weights', {k: v for k,v in whole.items() if k!=n})
    one = s.new_weights()[0]
    refused('1 unexpected weights', {**whole, one.replace('.mixer.', '.mixer.x.'):torch.zeros(1)})
    refused('missing', layers=[0,1])
    refused('missing|unexpected', layers=[0,1,2])
    refused('missing|unexpected', layers=[0])
    (tmp_path/'config.json').write_text(json.dumps(config))
    save_file({**whole, one:torch.zeros(3)}, file, metadata={'format':'pt'})
    with pytest.raises(RuntimeError): auto.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='mismatched'): auto.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    save_file(whole, file, metadata={'format':'pt'})
    assert same(copies(auto.from_pretrained(tmp_path)), copies(s))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception): auto.from_pretrained(tmp_path)

@pytest.mark.parametrize('name,to', [('ctc','mamba2'),('text','linformer'),('lm','mamba'),('text','identity')])
def test_the_plain_class_does_not_open_a_converted_folder(name, to, tmp_path):
    s = convert(model(name), to=to) if to=='identity' else student(name, to)
    s.save_pretrained(tmp_path)
    plain = sources[name][0]
    for config in (None,s.config,AutoConfig.from_pretrained(tmp_path),sources[name][1].from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match='after `import cald`'): plain.from_pretrained(tmp_path, config=config)
    with pytest.raises(ValueError, match='after `import cald`'): plain.__mro__[1].from_pretrained(tmp_path)   # its abstract parent
    assert same(copies(type(s).from_pretrained(tmp_path)), copies(s))                                       # and still ours does

FRESH = '''
import json, sys, torch
folder = sys.argv[1]
import transformers
assert 'cald' not in sys.modules
def refused(load, *words):
    try: load()
    except (ValueError, OSError, ImportError) as e: assert any(w in str(e) for w in words), e
    else: raise AssertionError(f'{words}: loaded')
class NoCald:
    def find_spec(self, name, *args):
        if name.split('.')[0]=='cald': raise ModuleNotFoundError(f'No module named {name!r}')
def check(name, **trust):
    m = getattr(transformers, cases[name][0]).from_pretrained(f'{folder}/{name}', **trust)
    x = load_file(f'{folder}/{name}/x.st')
    want = x.pop('out')
    with torch.no_grad(): assert torch.equal(m(**x)[0], want), name
cases = json.load(open(f'{folder}/cases.json'))
for name,(auto,plain) in cases.items():
    refused(lambda: getattr(transformers, auto).from_pretrained(f'{folder}/{name}'), 'trust_remote_code=True')
    refused(lambda: getattr(transformers, plain).from_pretrained(f'{folder}/{name}'), 'after `import cald`')
from safetensors.torch import load_file
sys.meta_path.insert(0, NoCald())
refused(lambda: check('ctc', trust_remote_code=True), 'pip install cald')
del sys.meta_path[0]
check('ctc', trust_remote_code=True)
import cald
for name,(auto,plain) in cases.items():
    refused(lambda: getattr(transformers, plain).from_pretrained(f'{folder}/{name}'), 'after `import cald`')
    check(name)
assert len([m for m in sys.modules if m.endswith('modeling_cald')])==1
print('all', len(cases))
'''

def fresh(code, *args, **env):
    env = {**os.environ, **env, 'PYTHONPATH':str(root), 'TRANSFORMERS_VERBOSITY':'error', 'HF_HUB_OFFLINE':'1',
           'OMP_NUM_THREADS':str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, '-c', code, *map(str, args)], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-3000:]
    return done.stdout

def test_another_process_without_the_source_gets_the_same_student(tmp_path):
    cases = {}
    for name,to,args in [('ctc','mamba2',{}), ('audio','mamba',{}), ('text','linformer',dict(share='layer')),
                         ('mlm','mamba2',dict(layers=[1])),
                         ('lm','mamba',{})]:
        s,x = student(name, to, **args),inputs(name)
        s.save_pretrained(tmp_path/name)
        save_file({**x, 'out':run(s, x)[0].contiguous()}, tmp_path/name/'x.st')
        cases[name] = sources[name][3].__name__,sources[name][0].__name__
    (tmp_path/'cases.json').write_text(json.dumps(cases))
    assert fresh(FRESH, tmp_path, HF_MODULES_CACHE=str(tmp_path/'code')).strip().endswith('all 5') # where transformers copies code

@pytest.mark.parametrize('trust', [None,False,True])
def test_the_code_of_a_folder_is_not_run_after_import_cald(trust, tmp_path):
    s = student('lm', 'mamba')
    s.config.auto_map = dict(AutoModel='theirs.Model')
    s.save_pretrained(tmp_path)
    (tmp_path/'modeling_cald.py').write_text('raise RuntimeError')
    s2 = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(s2) is type(s) and AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust).to_dict()==s2.config.to_dict()
    s2.config.register_for_auto_class()                                            # as for a folder that asks for its code
    s2.save_pretrained(tmp_path/'again')
    names = dict(AutoConfig='CaldGPTNeoXConfig', AutoModelForCausalLM='CaldGPTNeoXForCausalLM')
    assert json.loads((tmp_path/'again/config.json').read_text())['auto_map']=={k: f'modeling_cald.{v}' for k,v in names.items()}
    assert {f.suffix for f in (tmp_path/'again').iterdir()}=={'.json','.safetensors','.py'}
    assert [f.name for f in (tmp_path/'again').glob('*.py')]==['modeling_cald.py']

def test_import_cald_needs_no_transformers():
    code = '''
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0]==sys.argv[1]: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n==sys.argv[1] else find(n, p)
import cald
print(cald.__version__)'''
    assert fresh(code, 'transformers').strip()==cald.__version__

# ---- the registry

@pytest.mark.parametrize('name,epsilon', [('lm',.1),('mlm',.1),('text',.1),('lm',0.)])
def test_label_smoothing_is_that_of_the_source(name, epsilon, tmp_path):
    m,x = model(name),inputs(name)
    labels = torch.tensor([0,2]) if name=='text' else x['input_ids'].masked_fill(x['attention_mask']==0, -100)
    args = TrainingArguments(tmp_path, label_smoothing_factor=epsilon, report_to=[], use_cpu=True)
    def loss(m): return Trainer(m, args).compute_loss(m, dict(x, labels=labels)).item()
    assert loss(convert(m, to='identity'))==loss(m)

@pytest.mark.parametrize('names', [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES])
def test_the_tables_of_transformers_have_the_names_of_converted_classes(names):
    pairs = [(a.__name__,b.__name__) for f in FAMILIES.values() for a,b in f.students.items()]
    found = [b for a,b in pairs if a in names.values()]
    assert found and set(found)<=set(names.values())


def test_errors_say_what_there_is():
    m,other = model('ctc'),BertForNextSentencePrediction(BertConfig(**tokens))
    for bad,error,match in [
        (lambda: convert(nn.Linear(2, 2)), TypeError, 'a Linear: `families'),
        (lambda: convert(other), TypeError, 'BertForNextSentencePrediction, but a BertForSequenceClassification: `families'),
        (lambda: convert(convert(m)), TypeError, 'converted already'),
        (lambda: convert(model('mlm', is_decoder=True)), TypeError, 'is_decoder'),
        (lambda: convert(m, to='mamba3'), ValueError, 'known: mamba2, mamba, linformer, identity'),
        (lambda: convert(model('lm'), to='linformer'), ValueError, 'choose mamba or mamba2'),
        (lambda: convert(m, to='linformer'), TypeError, 'max_length'),
        (lambda: convert(m, slots=3), TypeError, "'slots'; known: d_state"),
        (lambda: convert(model('lm'), residual=True), TypeError, "'residual'"),
        (lambda: convert(m, to='identity', d_state=3), TypeError, 'known: none'),
        (lambda: convert(m, headdim=7), ValueError, 'headdim=7'),
        (lambda: convert(m, layers=[]), ValueError, 'from 0 to 2'),
        (lambda: convert(m, layers=[0,0]), ValueError, 'from 0 to 2'),
        (lambda: convert(m, layers=[3]), ValueError, 'from 0 to 2'),
        (lambda: convert(m, layers=[-1]), ValueError, 'from 0 to 2')]:
        with pytest.raises(error, match=match): bad()
    assert list(families().index)[:4]==['wav2vec2','roberta','bert','gpt_neox']

@pytest.mark.parametrize('args,match', [
    (dict(expand=.001), 'expand=0.001: no width from d_model=32'),
    (dict(to='mamba', expand=.001), 'no width'),
    *[(dict(to='mamba', d_inner=v), rf'd_inner={v!r}: give an integer above 0') for v in (-3,0,'x')],
    *[(dict(A_range=v), re.escape(f'A_range={v!r}: give two numbers')) for v in ((-1,16),16,(16,1),(0,1),(1,2,3))],
    (dict(dt_min=0), 'dt_min=0: give a number above 0'),
    (dict(dt_min=1., dt_max=.1), 'dt_min=1.0 is above dt_max=0.1'),
    *[({name:'no'}, f"{name}='no': give True or False") for name in ('bias','conv_bias','residual')],
    *[(dict(layers=v), re.escape(f'layers={v!r}: give different integers from 0 to 2')) for v in (True,'0',[0.],torch.tensor([0,1]))],
    *[(dict(seed=v), f'seed={v!r}: give an integer, or None') for v in ('a',1.5,True)]])
def test_an_argument_out_of_range_is_named(args, match):
    with pytest.raises(ValueError, match=match): convert(model('ctc'), **args)

@pytest.mark.parametrize('wrong', ['roberta-base',None])
def test_what_is_no_model_is_refused_in_a_line(wrong):
    with pytest.raises(TypeError, match=r"pass a model, such as AutoModelForCTC.*, not '?(roberta-base|None)") as e: convert(wrong)
    assert len(str(e.value))<120

def test_a_model_that_is_not_converted_has_no_report():
    m = model('ctc')
    for call in (lambda: report(m), lambda: transfer(m, m)):
        with pytest.raises(TypeError, match='pass a converted model, as `convert` returns it, not a Wav2Vec2ForCTC'): call()

@pytest.mark.parametrize('change,match', [
    (dict(to='mambo'), "unknown mixer 'mambo'"), (dict(family='robert'), "did you mean 'roberta'"), (dict(layers=[7]), 'integers from 0 to 2'),
    (dict(args=dict(d_stat=8)), "no argument 'd_stat'"), (dict(args=dict(A_range=[-1,16])), 'A_range'), (dict(args=dict(headdim=7)), 'headdim=7')])
def test_a_damaged_configuration_is_named_with_its_folder(change, match, tmp_path):
    student('text').save_pretrained(tmp_path/'damaged')
    file = tmp_path/'damaged'/'config.json'
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, 'cald':{**config['cald'], **change}}))
    with pytest.raises(ValueError, match=f'damaged: .*{match}'): AutoModelForSequenceClassification.from_pretrained(tmp_path/'damaged')

def test_missing_weights_come_with_the_parts_that_may_be_new():
    from cald.pretrained import load_pretrained,shipped
    with pytest.raises(ValueError, match=r"new=\['classifier', 'projector'\]"):
        load_pretrained(Wav2Vec2ForSequenceClassification, shipped('wav2vec2-demo'))

class TwoHeads(Wav2Vec2ForSequenceClassification):
    "A head that transformers does not have"
    def __init__(self, config):
        super().__init__(config)
        self.second = nn.Linear(config.classifier_proj_size, 5)
        self.post_init()

def test_a_head_of_ones_own(tmp_path):
    torch.manual_seed(0)
    m = TwoHeads(Wav2Vec2Config(**w2v)).eval()
    with pytest.raises(TypeError, match='register_head'): convert(m)
    try:
        cls = register_head('wav2vec2', TwoHeads)
        s = convert(m, seed=0, **mixers['mamba2'])
        s.save_pretrained(tmp_path)
        assert type(s) is cls and same(copies(cls.from_pretrained(tmp_path)), copies(s)) and torch.equal(s.second.weight, m.second.weight)
        with pytest.raises(ValueError, match='after `import cald`'): TwoHeads.from_pretrained(tmp_path)
    finally: FAMILIES['wav2vec2'].students.pop(TwoHeads, None)

# ---- report and transfer

@pytest.mark.parametrize('name,to', pairs)
def test_the_report_accounts_for_every_parameter(name, to):
    s = student(name, to, layers=[0,2])
    r = report(s)
    assert r.parameters.sum()==s.num_parameters() and not r.start.str.contains('{', regex=False).any()
    new = sum(s.get_parameter(n).numel() for n in s.new_weights())
    assert r[r.weights=='new'].parameters.sum()==new and set(r[r.weights=='new'].layers)=={'0 2'}

def test_transfer_takes_all_but_the_mixers():
    m = model('text')
    s,before = student('text', 'linformer', m),None
    other = RobertaForSequenceClassification(m.config)
    before = copies(s)
    names = transfer(s, other)
    assert set(names)|set(s.new_weights())==set(everything(s))
    for n,t in everything(s).items(): assert torch.equal(t, before[n] if n in s.new_weights() else everything(other)[n])
    wide = RobertaForSequenceClassification(RobertaConfig(**{**m.config.to_dict(), 'num_labels':7, 'id2label':None, 'label2id':None}))
    with pytest.raises(ValueError, match='classifier.out_proj'): transfer(s, wide)
    assert 'classifier.out_proj.weight' not in transfer(s, wide, strict=False)
    with pytest.raises(ValueError): transfer(s, model('lm'), strict=False)

@pytest.mark.parametrize('change', [
    dict(layers=[-1,-2]), dict(layers=[0,0]), dict(layers=None), dict(layers=[True,False]), dict(family=['roberta']), dict(to='__class__'),
    dict(args=dict(chunk=0)), dict(args=dict(d_state=10**9)), dict(args=dict(d_conv=10**9)), dict(args=dict(__class__=1)), dict(args=[1]), [1], 'x', 200_000])
def test_a_hostile_configuration_is_an_error(tmp_path, change):
    "Names are looked up in tables only, and sizes are bounded before memory is taken"
    config = transformers.RobertaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16)
    torch.manual_seed(0)
    convert(transformers.RobertaForSequenceClassification(config), to='mamba2', seed=0).save_pretrained(tmp_path)
    file = tmp_path/'config.json'
    values = json.loads(file.read_text())
    if isinstance(change, dict):
        args = change.get('args')
        values['cald'].update(change, args={**values['cald']['args'], **args} if isinstance(args, dict) else args or values['cald']['args'])
    elif isinstance(change, int): values['num_hidden_layers'] = change
    else: values['cald'] = change
    file.write_text(json.dumps(values))
    with pytest.raises((ValueError,RuntimeError)): transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
