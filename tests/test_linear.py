"The further mixers: float64 references, padding, pieces, caches, starts from the attention."
import math
import pytest, torch
import torch.nn.functional as F
from transformers import LlamaConfig,LlamaForCausalLM,RobertaConfig,RobertaForSequenceClassification,Wav2Vec2Config,Wav2Vec2ForCTC
from transformers import GPTNeoXConfig,GPTNeoXForCausalLM
from cald.align import align
from cald.convert import convert,report
from cald.linear import delta_rule as rule,s4d
from cald.linear.attention import HeadMixer,LinearAttention,outer_sums,Retention
from cald.linear.delta_rule import delta_rule,delta_rule_recurrence,GatedDeltaNet,RWKV7
from cald.linear.s4d import diagonal_ssm,diagonal_ssm_recurrence,S4D
from cald.linear.window import SlidingWindow
from cald.mixers import Bidirectional,MixerState,Recurrent
from cald.models import MIXER_CLASSES,MIXERS,register_mixer

f64 = torch.float64

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

# arguments for a width of 16
ARGS = dict(linear_attention=dict(headdim=4), retention=dict(headdim=4), gated_deltanet=dict(headdim=4), rwkv7=dict(headdim=4, rank=3),
            s4d=dict(d_state=6), window=dict(headdim=4, window=4, sinks=2))
VARIANTS = {**{name: (name, {}) for name in ARGS}, 'elu':('linear_attention', dict(feature='elu')),
            'bias':('gated_deltanet', dict(bias=True, d_inner=8)), 'window, turning':('window', dict(rotary=2, bias=True)),
            'no sinks':('window', dict(sinks=0))}
every = pytest.mark.parametrize('name', VARIANTS)

def make(name, **more):
    to,args = VARIANTS[name]
    m = MIXER_CLASSES[to](16, **{**ARGS[to], **args, **more}).double()
    for p in m.parameters(): # the low-rank parts of RWKV-7 start at 0
        if not p.any(): torch.nn.init.normal_(p, std=.3)
    return m

def both_ways(name):
    if VARIANTS[name][0]=='window': return make(name, causal=False)
    return Bidirectional(lambda: make(name))

def compare(a, b, eps=1e-9): torch.testing.assert_close(a, b, rtol=eps, atol=eps)

# --- operators ---------------------------------------------------------------------------------------------------------------------

def rule_inputs(length, channels, n=4, p=3):
    q,k,a,b = torch.randn(4, 2, length, 2, n, dtype=f64)
    w = -F.softplus(torch.randn(2, length, 2, n if channels else 1, dtype=f64))
    return [q, k, torch.randn(2, length, 2, p, dtype=f64), w, .3*a, .3*b]

def ssm_inputs(length, d=3, n=4):
    log_a = torch.complex(-torch.rand(d, n, dtype=f64), 3*torch.randn(d, n, dtype=f64))
    return [torch.randn(2, length, d, dtype=f64), log_a, torch.randn(d, n, dtype=torch.complex128), torch.randn(d, dtype=f64)]

OPS = dict(rule=(delta_rule, delta_rule_recurrence, lambda l: rule_inputs(l, False), lambda: torch.randn(2, 2, 3, 4, dtype=f64)),
           channels=(delta_rule, delta_rule_recurrence, lambda l: rule_inputs(l, True), lambda: torch.randn(2, 2, 3, 4, dtype=f64)),
           ssm=(diagonal_ssm, diagonal_ssm_recurrence, ssm_inputs, lambda: torch.randn(2, 3, 4, dtype=torch.complex128)))
ops = pytest.mark.parametrize('name', OPS)

def same_as_recurrence(name, length):
    "Outputs, states and gradients, with and without a state before"
    fast,slow,inputs,state = OPS[name]
    for before in (None, state().requires_grad_()):
        args = [t.requires_grad_() for t in inputs(length)]
        wrt = args if before is None else [*args, before]
        results = []
        for op in (slow, fast):
            y,after = op(*args, state=before)
            loss = (y*torch.linspace(1, 2, length, dtype=f64).view(1, -1, *[1]*(y.ndim-2))).sum()+after.abs().square().sum()
            results.append([y, after, *torch.autograd.grad(loss, wrt)])
        for want,got in zip(*results): compare(got, want, 1e-7)

@ops
@pytest.mark.parametrize('length', (1,2,15,16,17,63,257))
def test_the_fast_form_is_the_recurrence(name, length): same_as_recurrence(name, length)

@ops
def test_float32_keeps_its_digits(name):
    fast,slow,inputs,_ = OPS[name]
    exact = inputs(300)
    y,after = slow(*exact)
    rough = [t.to(torch.complex64 if t.is_complex() else torch.float32) for t in exact]
    for got,want in zip(fast(*rough), (y,after)):
        assert (got.to(want.dtype)-want).norm()<3e-6*want.norm()

def test_slow_and_very_fast_decays_in_one_chunk():
    q,k,v,_,a,b = rule_inputs(50, True)
    w = torch.where(torch.rand(2, 50, 2, 1)<.5, -1e-6, -300.).double() # for each head: exact differences
    for got,want in zip(delta_rule(q, k, v, w, a, b), delta_rule_recurrence(q, k, v, w, a, b)): compare(got, want)
    w = torch.where(torch.rand(2, 50, 2, 4)<.5, -1e-6, -9.).double()   # for each channel: down to -10
    got,_ = delta_rule(*(t.float() for t in (q,k,v,w,a,b)))
    want,_ = delta_rule_recurrence(q, k, v, w, a, b)
    assert (got.double()-want).norm()<1e-5*want.norm()

@ops
def test_gradcheck(name):
    fast,_,inputs,_ = OPS[name]
    args = [t.requires_grad_() for t in inputs(5)]
    assert torch.autograd.gradcheck(lambda *a: fast(*a)[0], args)

def keeps_the_diagonal(scores): return scores
def forgets_the_state(weights, log_a, length): return 0*s4d_power_sums(weights, log_a, length)
s4d_power_sums = s4d.power_sums

@pytest.mark.parametrize('name,module,part,wrong', [('rule', rule, 'before', keeps_the_diagonal),
                                                    ('channels', rule, 'decayed_scores', lambda x, y, w: (x@y.mT).tril()),
                                                    ('ssm', s4d, 'power_sums', forgets_the_state)])
def test_a_wrong_operator_is_noticed(monkeypatch, name, module, part, wrong):
    monkeypatch.setattr(module, part, wrong)
    with pytest.raises(AssertionError): same_as_recurrence(name, 17)

# --- blocks ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('front', (False, True), ids=('behind','in front'))
@pytest.mark.parametrize('pair', (False, True), ids=('one','pair'))
@every
def test_a_sample_alone_is_the_sample_in_a_batch(name, pair, front):
    m = both_ways(name) if pair else make(name)
    x,n = torch.randn(4, 19, 16, dtype=f64),[19,5,1,12]
    mask = torch.arange(19)<torch.tensor(n)[:,None]
    alone = torch.cat([m(r[None,:k])[0] for r,k in zip(x, n)])
    weight = torch.randn_like(alone)
    parameters = [p for p in m.parameters() if p.requires_grad]
    want = torch.autograd.grad((alone*weight).sum(), parameters, allow_unused=True)
    x = x.masked_fill(~mask[...,None], math.nan)
    if front: x,mask = torch.stack([r.roll(19-k, 0) for r,k in zip(x, n)]),mask.flip(1)
    y = m(x, mask)
    compare(y[mask], alone)
    assert (y[~mask]==0).all()
    got = torch.autograd.grad((y[mask]*weight).sum(), parameters, allow_unused=True)
    for a,b in zip(got, want): compare(a, b, 1e-8)

@every
def test_pads_between_tokens_are_skipped(name):
    m,x = make(name),torch.randn(2, 9, 16, dtype=f64)
    mask = torch.tensor([[1,1,1,0,0,1,1,0,1],[0,1,1,1,1,1,0,0,0]]).bool()
    y = m(x.masked_fill(~mask[...,None], math.nan), mask)
    for i in (0,1): compare(y[i][mask[i]], m(x[i][mask[i]][None])[0])

@every
@pytest.mark.parametrize('cut', ([9],[1]*9,[4,5],[2,1,6]))
def test_pieces_with_pads_anywhere_are_the_whole(name, cut):
    m,x = make(name).requires_grad_(False),torch.randn(3, 9, 16, dtype=f64)
    mask = torch.tensor([[1,1,1,1,1,1,1,1,1],[0,0,1,1,0,1,1,1,0],[0,0,0,0,0,0,1,0,1]]).bool()
    state,ys = MixerState(),[]
    for piece,tokens in zip(x.masked_fill(~mask[...,None], math.nan).split(cut, 1), mask.split(cut, 1)):
        y,state = m(piece, tokens, state)
        ys.append(y)
    y = torch.cat(ys, 1)
    for i in range(3):
        want,after = m(x[i:i+1,mask[i]], state=MixerState())
        compare(y[i,mask[i]], want[0])
        if name!='window' and not name.startswith(('window','no sinks')): compare(state.ssm[i], after.ssm[0])
    assert (y[~mask]==0).all()

@every
def test_causal_alone_and_not_in_both_directions(name):
    x = torch.randn(1, 20, 16, dtype=f64)
    late = x.clone()
    late[:,15:] += 1
    m,pair = make(name),both_ways(name)
    compare(m(late)[:,:15], m(x)[:,:15])
    assert (m(late)[:,15:]!=m(x)[:,15:]).any()
    assert (pair(late)[:,14]!=pair(x)[:,14]).any()

@every
def test_16_bits_and_autocast(name):
    m = make(name).float()
    x = torch.randn(2, 12, 16)
    exact = m(x)
    with torch.autocast('cpu', dtype=torch.bfloat16): y = m(x)
    assert y.dtype==torch.bfloat16 and (y-exact).norm()<.05*exact.norm()
    y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters() if p.grad is not None)
    low = m.bfloat16()
    y,state = low(x.bfloat16(), state=MixerState())
    y,state = low(x[:,:1].bfloat16(), state=state)
    assert y.dtype==torch.bfloat16 and state.ssm.dtype in (torch.float32,torch.complex64,torch.long)

def test_linear_attention_is_the_sum_over_all_earlier_positions():
    m = make('linear_attention')
    x = torch.randn(2, 70, 16, dtype=f64)
    phi_q,phi_k = (m.features(m.in_heads(p(x)), n).transpose(1, 2) for p,n in ((m.q_proj,'q'),(m.k_proj,'k')))
    weights = (phi_q@phi_k.mT).tril()
    y = weights/weights.sum(-1, keepdim=True)@m.in_heads(m.v_proj(x)).transpose(1, 2)
    compare(m(x), m.out_proj(y.transpose(1, 2).flatten(2)), 1e-5)

def test_rwkv7_by_its_equations():
    "Position after position, in the notation of the paper"
    m = make('rwkv7')
    x = torch.randn(1, 6, 16, dtype=f64)
    S,x_before,ys = torch.zeros(4, 4, 4, dtype=f64),torch.zeros(16, dtype=f64),[]
    def heads(t): return t.view(4, 4)
    for x_t in x[0]:
        r_in,w_in,k_in,v_in,a_in,g_in = (x_t+(x_before-x_t)*mu for mu in m.shift)
        w = torch.exp(-math.exp(-.5)*torch.sigmoid(m.decay(w_in)))
        eta,k,v,r = torch.sigmoid(m.rate(a_in)),m.k_proj(k_in),m.v_proj(v_in),m.q_proj(r_in)
        kappa = F.normalize(heads(k*m.removal), dim=-1)
        added = heads(k*(1+(eta-1)*m.added))
        for h in range(4):
            transition = torch.diag(heads(w)[h])-torch.outer(kappa[h], heads(eta)[h]*kappa[h])
            S[h] = S[h]@transition+torch.outer(heads(v)[h], added[h])
        y = m.norm((S@heads(r)[...,None]).reshape(1, 16))[0]
        y = y+((heads(r)*added*m.bonus).sum(-1, keepdim=True)*heads(v)).flatten()
        ys.append(m.out_proj(y*m.gate(g_in)))
        x_before = x_t
        S = S.detach()
    compare(m(x)[0], torch.stack(ys))

def test_gated_deltanet_forgets_and_replaces():
    m = make('gated_deltanet')
    x = torch.randn(1, 7, 16, dtype=f64)
    qkv = torch.cat([m.q_proj(x),m.k_proj(x),m.v_proj(x)], -1)
    qkv = F.silu(F.conv1d(F.pad(qkv.mT, (3,0)), m.conv1d.weight, groups=48)).mT
    q,k,v = (t.view(7, 4, 4) for t in qkv[0].chunk(3, -1))
    q,k = F.normalize(q, dim=-1),F.normalize(k, dim=-1)
    alpha,beta = m.log_decay(x)[0].exp(),m.beta_proj(x)[0].sigmoid()
    S,ys = torch.zeros(4, 4, 4, dtype=f64),[]
    for t in range(7):
        for_heads = []
        for h in range(4):
            erase = torch.eye(4, dtype=f64)-beta[t,h]*torch.outer(k[t,h], k[t,h])
            for_heads.append(alpha[t,h]*S[h]@erase+beta[t,h]*torch.outer(v[t,h], k[t,h]))
        S = torch.stack(for_heads)
        ys.append((S@q[t][...,None])[...,0])
    y = m.norm(torch.stack(ys)[None]).flatten(2)*F.silu(m.gate(x))
    compare(m(x), m.out_proj(y))

# --- converted models --------------------------------------------------------------------------------------------------------------

small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=40)
def llama(): return LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2, initializer_range=.3)).eval()
def neox():
    half = dict(rope_theta=1e4, rope_type='default', partial_rotary_factor=.5) # of the 4 channels of a head
    return GPTNeoXForCausalLM(GPTNeoXConfig(**small, initializer_range=.3, rope_parameters=half)).eval()
def roberta():
    config = RobertaConfig(**small, max_position_embeddings=40, initializer_range=.3)
    return RobertaForSequenceClassification(config).eval()
def speech():
    sizes = dict(small, conv_dim=(8,)*7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    return Wav2Vec2ForCTC(Wav2Vec2Config(**sizes)).eval()

def inputs(model):
    if model.main_input_name=='input_values': return dict(input_values=torch.randn(2, 4000), attention_mask=torch.ones(2, 4000).long())
    mask = torch.ones(2, 12).long()
    if model.can_generate(): mask[1,:5] = 0
    else: mask[1,7:] = 0
    return dict(input_ids=torch.randint(3, 40, (2, 12)), attention_mask=mask)

names = pytest.mark.parametrize('to', ARGS)

@names
@pytest.mark.parametrize('source', (llama,neox,roberta,speech))
def test_converted_saved_and_loaded(to, source, tmp_path):
    model = source()
    student = convert(model, to=to, seed=0, **ARGS[to]).eval()
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path).eval()
    batch = inputs(model)
    with torch.no_grad():
        logits = student(**batch).logits
        assert torch.equal(logits, loaded(**batch).logits) and logits.isfinite().all()
        assert not torch.allclose(logits, model(**batch).logits)
    assert report(student).parameters.sum()==student.num_parameters()

@names
@pytest.mark.parametrize('beams', (1,2))
@pytest.mark.parametrize('layers', (None,[1]), ids=('all','hybrid'))
def test_generation_with_a_cache_is_generation_without(to, beams, layers):
    model = convert(llama(), to=to, seed=0, layers=layers, **ARGS[to]).double()
    settings = dict(max_new_tokens=8, do_sample=False, num_beams=beams, pad_token_id=0, eos_token_id=None)
    batch = inputs(model)
    cached = model.generate(**batch, **settings)
    assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))
    alone = model.generate(batch['input_ids'][1:,5:], **settings)
    assert torch.equal(alone[0,7:], cached[1,12:])

@names
@pytest.mark.parametrize('source', (llama,roberta,speech))
def test_it_starts_from_the_attention(to, source):
    model = source()
    args = {} if to not in ('window','rwkv7') else dict(window=dict(window=32), rwkv7=dict(rank=3))[to]
    student = convert(model, to=to, seed=0, init='attention', **args).eval()
    mixer = next(iter(student.replacements.values())).mixer
    first = getattr(mixer, 'fw', mixer)
    attention = model.get_submodule(next(iter(student.replacements)))
    value = getattr(attention, 'v_proj', None) or attention.value
    taken = first.in_proj if to=='s4d' else first.v_proj
    assert torch.equal(taken.weight[:4], value.weight[:4])
    starts = report(student).query("weights=='new'").start
    assert 'the values' in starts.values and not starts.str.contains('its class').any()

@pytest.mark.parametrize('source', (llama,neox,roberta,speech))
def test_a_window_over_the_whole_text_is_the_attention(source):
    model = source().double()
    batch = inputs(model)
    batch = {k: v.double() if v.is_floating_point() else v for k,v in batch.items()}
    student = convert(model, to='window', init='attention', window=32).eval()
    tokens = batch['attention_mask'].bool() if model.can_generate() else slice(None)
    with torch.no_grad(): compare(student(**batch).logits[tokens], model(**batch).logits[tokens], 1e-5) # its angles are float32

@names
def test_alignment_lowers_every_error(to):
    model = llama()
    texts = torch.randint(3, 40, (64,12))
    data = [dict(input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in texts]
    student = convert(model, to=to, seed=0, **ARGS[to])
    errors = align(student, model, data, steps=30, lr=1e-2, calibration=4)
    assert (errors['after']<errors['before']).all()

def test_a_mixer_from_outside_needs_nothing_but_mix(tmp_path):
    class Identity(Recurrent):
        def __init__(self, d_model, scale:float=1.):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(scale))
        def mix(self, x, mask=None, state=None): return self.scale*x,MixerState(x[:,:0,0],x[:,:0,0])
    register_mixer('outside', Identity)
    try:
        student = convert(llama(), to='outside', scale=2.)
        assert report(student).query("weights=='new'").start.tolist()==['as its class starts it']
        student.save_pretrained(tmp_path)
        loaded = type(student).from_pretrained(tmp_path)
        assert next(iter(loaded.replacements.values())).mixer.scale.item()==2
        with pytest.raises(ValueError, match="outside has no start from an attention: use init='fresh'"):
            convert(llama(), to='outside', init='attention')
    finally:
        MIXERS.remove('outside')
        del MIXER_CLASSES['outside']

@pytest.mark.parametrize('args,message', [
    (dict(to='window', window=0), 'window=0: give an integer above 0'), (dict(to='window', sinks=-1), 'sinks=-1: give an integer, 0 or more'),
    (dict(to='window', window=1), 'give at least 2 positions'), (dict(to='rwkv7', rank='x'), "rank='x': give an integer above 0"),
    (dict(to='linear_attention', feature='relu'), 'choose hedgehog or elu'), (dict(to='s4d', d_state=5), 'give an even number'),
    (dict(to='retention', headdim=1), 'give an even number'), (dict(to='gated_deltanet', headdim=5), 'headdim=5 does not divide')])
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message): convert(llama(), **args)
