"Generation with states in place of keys and values: in pieces, in batches, by beams, and all that must be refused."
import copy, functools, os

import pytest, torch, torch.nn.functional as F, transformers
from torch._dynamo.utils import counters
from transformers import (AutoModelForCausalLM, CompileConfig, DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel,
                          RobertaConfig, RobertaForMaskedLM, StaticCache)

import cald.mixers
from cald.convert import convert
from cald.mixers import Bidirectional,Mamba,Mamba2,MixerState
from cald.models import MixerCacheLayer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

f64 = torch.float64
size = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=60, max_position_embeddings=44,
            initializer_range=0.3)
args = dict(mamba=dict(d_state=4, chunk=4), mamba2=dict(d_state=8, headdim=16, ngroups=2, chunk=4))
more = dict(linear_attention=dict(headdim=8), retention=dict(headdim=8), gated_deltanet=dict(headdim=8),
            rwkv7=dict(headdim=8, rank=4), s4d=dict(d_state=8), window=dict(headdim=8, window=5, sinks=2))
if os.environ.get('CALD_SLOW'): args |= more # tests/test_linear.py has the shorter tests of these
mixers = pytest.mark.parametrize('to', args)
layouts = pytest.mark.parametrize('layers', [None,[0],[1,2]], ids=['all','first','last'])
CUTS = ([12],[1]*12,[5,7],[1,2,9],[11,1])
N = 12

@functools.cache
def source():
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**size)).double().eval().requires_grad_(False)

@functools.cache
def student(to, layers=None):
    "A hybrid whose new mixers are as loud as the attention that they replace, so that mistakes change tokens"
    s = convert(source(), to=to, layers=layers, seed=0, **args[to]).requires_grad_(False)
    for m in s.replacements.values(): m.mixer.out_proj.weight.mul_(10 if to=='mamba' else 2)
    return s

def model(to, layers): return student(to, None if layers is None else tuple(layers))

def prompts(kind='left'):
    "Three prompts: input_ids and attention_mask, with the pads in front, behind, anywhere, or none; noise under the pads"
    ids = torch.randint(3, 60, (3,N), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row,n in ((1,7),(2,1)):
        if kind=='left': mask[row,:-n] = 0
        if kind=='right': mask[row,n:] = 0
    if kind=='anywhere': mask[1],mask[2] = torch.tensor([0,1,1,0,0,1,1,1,0,1,0,1]),torch.tensor([0]*6+[1,0,0,1,0,0])
    return dict(input_ids=ids, attention_mask=mask)

def positions(mask): return (mask.cumsum(1)-1).clamp(min=0)

def fed(m, ids, mask, cut, cache=None):
    "Logits of `ids` fed in pieces of the lengths `cut`, and the cache"
    cache,at,ys = DynamicCache() if cache is None else cache,0,[]
    for n in cut:
        seen = mask[:,:at+n]
        ys.append(m(ids[:,at:at+n], attention_mask=seen, position_ids=positions(seen)[:,at:], past_key_values=cache).logits)
        at += n
    return torch.cat(ys, 1),cache

def held(cache):
    "Bytes of storage that each layer of `cache` keeps"
    kept = [l.state if isinstance(l, MixerCacheLayer) else (l.keys,l.values) for l in cache.layers]
    return [sum(t.untyped_storage().nbytes() for t in ts) for ts in kept]

def close(a, b, eps=1e-9): torch.testing.assert_close(a, b, rtol=eps, atol=eps)

# ---- the mixers

BLOCKS = {k: (cls, dict(a, **more)) for k,cls,a,more in [
    ('mamba', Mamba, args['mamba'], {}), ('mamba, wide', Mamba, args['mamba'], dict(d_inner=20, dt_rank=3, bias=True, d_conv=2)),
    ('mamba2', Mamba2, dict(args['mamba2'], headdim=4), {}), ('mamba2, no window', Mamba2, dict(args['mamba2'], headdim=4), dict(d_conv=1, bias=True)),
    ('mamba2, no bias', Mamba2, dict(args['mamba2'], headdim=4), dict(conv_bias=False, ngroups=1))]}

def block(name):
    torch.manual_seed(0)
    cls,a = BLOCKS[name]
    return cls(8, **a).double().requires_grad_(False)

def pieces(m, x, mask, cut):
    state,ys = MixerState(),[]
    for p,k in zip(x.split(cut, 1), [None]*len(cut) if mask is None else mask.split(cut, 1)):
        y,state = m(p, k, state)
        ys.append(y)
    return torch.cat(ys, 1),state

def in_pieces_as_alone(m):
    "With pads anywhere and anything under them, each row is what its tokens are alone and at once, and so is its state"
    x,mask = torch.randn(3, N, 8, dtype=f64, generator=torch.Generator().manual_seed(2)),prompts('anywhere')['attention_mask'].bool()
    noisy = x.masked_fill(~mask[...,None], float('nan'))
    for cut in CUTS:
        y,state = pieces(m, x, None, cut)
        close(y, m(x))
        y,state = pieces(m, noisy, mask, cut)
        assert not y[~mask].any()
        for i in range(3):
            own = x[i:i+1,mask[i]]
            close(y[i:i+1,mask[i]], m(own))
            for a,b in zip(state, m(own, state=MixerState())[1]): close(a[i:i+1], b)

@pytest.mark.parametrize('name', BLOCKS)
def test_pieces_are_the_whole(name): in_pieces_as_alone(block(name))

@pytest.mark.parametrize('name', ['mamba','mamba2'])
def test_a_state_is_not_changed_by_its_use_and_holds_only_itself(name):
    m,x = block(name),torch.randn(2, 40, 8, dtype=f64)
    _,state = m(x[:,:30], state=MixerState())
    before = [t.clone() for t in state]
    for n in (1,10):
        a,b = m(x[:,30:30+n], state=state),m(x[:,30:30+n], state=state)
        assert torch.equal(a[0], b[0]) and all(map(torch.equal, state, before)) and all(map(torch.equal, a[1], b[1]))
        assert [t.untyped_storage().nbytes() for t in a[1]]==[8*t.numel() for t in before]

@pytest.mark.parametrize('name', ['mamba','mamba2'])
def test_gradients_pass_through_the_state(name):
    m,x = block(name).requires_grad_(True),torch.randn(2, 9, 8, dtype=f64)
    def grads(y): return torch.autograd.grad(y.sin().sum(), list(m.parameters()))
    for a,b in zip(grads(m(x)), grads(pieces(m, x, None, [4,1,4])[0])): close(a, b)

def lose(m, what):
    "`m` with a mistake"
    mix = m.mix
    if what=='scan':   m.mix = lambda x,mask=None,state=None: mix(x, mask, state and state._replace(ssm=None))
    if what=='window': m.mix = lambda x,mask=None,state=None: mix(x, mask, state and state._replace(conv=None))
    if what=='several tokens': m.mix = lambda x,mask=None,state=None: mix(x, mask, state and (state if x.shape[1]==1 else state._replace(ssm=None)))
    if what=='gaps':   m.forward = lambda x,mask=None,state=None: mix(x, mask, state) if state else mix(x, mask)[0]
    return m

@pytest.mark.parametrize('name', ['mamba','mamba2'])
@pytest.mark.parametrize('what', ['scan','window','several tokens','gaps'])
def test_a_lost_state_is_noticed(name, what):
    with pytest.raises(AssertionError): in_pieces_as_alone(lose(block(name), what))

# ---- the model, in pieces

@mixers
@layouts
@pytest.mark.parametrize('pads', ['none','left','right','anywhere'])
@pytest.mark.parametrize('attn', ['sdpa','eager'])
def test_a_text_in_pieces_is_the_text(to, layers, pads, attn):
    m,x,eps = copy.deepcopy(model(to, layers)),prompts(pads),1e-9
    m.set_attn_implementation(attn)
    if attn=='eager': m,eps = m.float(),1e-3 # in float64 the eager softmax of transformers makes NaN of rows that are pads
    ids,mask = x.values()
    alone = [m(ids[i:i+1,mask[i].bool()]).logits for i in range(3)]
    for cut in CUTS[:4]:
        y,cache = fed(m, ids, mask, cut)
        for i in range(3): close(y[i:i+1,mask[i].bool()], alone[i], eps)
        assert cache.get_seq_length()==N and {l.get_seq_length() for l in cache.layers}=={N}

@mixers
@layouts
def test_without_a_mask_too_and_with_every_way_to_make_a_cache(to, layers):
    m,ids = model(to, layers),prompts('none')['input_ids']
    whole = m(ids).logits
    first = m(ids[:,:5], use_cache=True)                                 # the model makes it
    for cache in (first.past_key_values,DynamicCache(),DynamicCache(config=m.config)):
        n = cache.get_seq_length()
        assert n in (0,5)
        for i,j in [(n,6),(6,7),(7,N)]: y = m(ids[:,i:j], past_key_values=cache).logits
        close(y, whole[:,7:])
    base = type(m.base_model)                                            # the body alone has it as well
    assert base is GPTNeoXModel
    close(m.base_model(ids, use_cache=True).last_hidden_state, m.base_model(ids).last_hidden_state)

@mixers
@layouts
def test_only_softmax_layers_grow(to, layers):
    m,ids = model(to, layers),torch.randint(3, 60, (2,40), generator=torch.Generator().manual_seed(3))
    converted,cache,sizes = set(m.config.cald['layers']),DynamicCache(),[]
    for n in (1,2,20,1,16):
        m(ids[:,:n], past_key_values=cache)
        sizes.append(held(cache))
    for i,s in enumerate(zip(*sizes)): assert (len(set(s))==1) if i in converted else (sorted(set(s))==list(s)), (i,s)
    for i in converted: assert sizes[0][i]==sum(t.numel()*t.element_size() for t in cache.layers[i].state)

# ---- generate

WAYS = dict(greedy={}, sampled=dict(do_sample=True, top_k=0), beams=dict(num_beams=3), sampled_beams=dict(num_beams=2, do_sample=True),
            several=dict(do_sample=True, num_return_sequences=2), penalty=dict(repetition_penalty=1.3))

def write(m, x, **kw):
    torch.manual_seed(0)
    return m.generate(**x, **{**dict(max_new_tokens=8, pad_token_id=0, eos_token_id=None, do_sample=False), **kw})

@mixers
@layouts
@pytest.mark.parametrize('way', WAYS)
def test_generate_is_the_same_with_a_cache_and_without(to, layers, way):
    m,x = model(to, layers),prompts('left')
    a,b = (write(m, x, return_dict_in_generate=True, **WAYS[way], **more) for more in ({},dict(use_cache=False)))
    assert torch.equal(a.sequences, b.sequences) and b.past_key_values is None
    assert a.past_key_values.get_seq_length()==N+7 and isinstance(a.past_key_values.layers[m.config.cald['layers'][0]], MixerCacheLayer)

@mixers
@layouts
@pytest.mark.parametrize('way', ['greedy','beams'])
def test_generate_in_a_padded_batch_is_generate_alone(to, layers, way):
    m,x = model(to, layers),prompts('left')
    both = write(m, x, **WAYS[way])
    for i in range(3):
        own = x['input_ids'][i:i+1,x['attention_mask'][i].bool()]
        assert torch.equal(both[i,N:], write(m, dict(input_ids=own, attention_mask=torch.ones_like(own)), **WAYS[way])[0,own.shape[1]:])

@mixers
@layouts
def test_generate_ends_where_it_should_and_takes_its_prompt_in_chunks_or_from_a_cache(to, layers):
    m,x = model(to, layers),prompts('left')
    out = write(m, x)
    for n in (1,5,N): assert torch.equal(out, write(m, x, prefill_chunk_size=n))
    cache = DynamicCache()
    half = write(m, x, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(half, out[:,:N+4]) and cache.get_seq_length()==N+3
    mask = torch.cat([x['attention_mask'], torch.ones(3, 4, dtype=torch.long)], 1)
    kept = copy.deepcopy(cache)
    assert torch.equal(write(m, dict(input_ids=half, attention_mask=mask), past_key_values=cache, max_new_tokens=4), out)
    kept = write(m, dict(input_ids=half, attention_mask=mask), past_key_values=kept, max_new_tokens=4) # a copy is a way back
    assert torch.equal(kept, out)
    ends = out[0,N+2].item()                                             # a row that has ended goes on with pads, the others as before
    stopped = write(m, x, eos_token_id=ends)
    assert torch.equal(stopped, write(m, x, eos_token_id=ends, use_cache=False)) and not stopped[0,N+3:].any()

@mixers
@layouts
def test_generate_goes_on_from_a_prompt_that_was_fed_in_pieces(to, layers):
    "Against `generate` without a cache, and token by token against the model that reads all anew for each"
    m,x = model(to, layers),prompts('left')
    greedy,sampled = (write(m, x, use_cache=False, **WAYS[w]) for w in ('greedy','sampled'))
    assert len(sampled[:,N:].unique())>8 # a student that says one thing only would agree with anything
    for cut in ([1]*11,[1,2,8]):
        ids,mask = x.values()
        cache = fed(m, ids[:,:-1], mask[:,:-1], cut)[1]
        assert torch.equal(write(m, x, past_key_values=copy.deepcopy(cache), **WAYS['sampled']), sampled)
        for _ in range(8):
            whole = m(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits[:,-1:]
            step = m(ids[:,-1:], attention_mask=mask, position_ids=positions(mask)[:,-1:], past_key_values=cache).logits
            close(step, whole)
            ids,mask = torch.cat([ids, step.argmax(-1)], 1),F.pad(mask, (0,1), value=1)
        assert torch.equal(ids, greedy)

@mixers
@layouts
@pytest.mark.parametrize('way', ['beams','sampled_beams','several'])
def test_a_prompt_in_chunks_is_written_on_as_without_a_cache(to, layers, way):
    m,x = model(to, layers),prompts('left')
    assert torch.equal(write(m, x, prefill_chunk_size=5, **WAYS[way]), write(m, x, use_cache=False, **WAYS[way]))

@mixers
def test_states_follow_the_rows(to):
    m,x = model(to, [0,2]),prompts('left')
    ids,mask = x.values()
    _,cache = fed(m, ids[:,:8], mask[:,:8], [8])
    rest = [ids[:,8:],mask]
    want = m(ids, attention_mask=mask, position_ids=positions(mask)).logits[:,8:]
    for change,rows in [(lambda c: c.reorder_cache(torch.tensor([2,0,0])), [2,0,0]), (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
                        (lambda c: c.batch_repeat_interleave(2), [0,0,1,1,2,2])]:
        c = copy.deepcopy(cache)
        change(c)
        i,k = (t[rows] for t in rest)
        close(m(i, attention_mask=k, position_ids=positions(k)[:,8:], past_key_values=c).logits, want[rows])

@mixers
def test_a_cache_starts_anew(to):
    "With all layers converted: before transformers 5.18 attention's layers keep their length"
    m,(ids,mask) = model(to, None),prompts('left').values()
    _,cache = fed(m, ids, mask, [N])
    cache.reset()
    assert cache.get_seq_length()==0
    close(fed(m, ids, mask, [4,8], cache)[0][0], fed(m, ids, mask, [N])[0][0])

# ---- as a model among models

@mixers
@pytest.mark.parametrize('layers', [None,[1]], ids=['all','middle'])
def test_it_comes_back_from_disk_with_its_cache(to, layers, tmp_path):
    m,x = model(to, layers),prompts('left')
    m.save_pretrained(tmp_path)
    back,out = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=f64),write(m, x)
    new = type(m)(copy.deepcopy(m.config)).double().eval()
    new.load_state_dict(m.state_dict())
    for s in (back,new):
        assert s.config.use_cache is True and s.generation_config.use_cache is True
        got = write(s, x, return_dict_in_generate=True)
        assert torch.equal(got.sequences, out) and got.past_key_values.get_seq_length()==N+7

def test_what_training_left_in_the_source_does_not_turn_the_cache_off():
    m = GPTNeoXForCausalLM(GPTNeoXConfig(**size, use_cache=False))
    assert m.generation_config.use_cache is False and convert(m, to='mamba').generation_config.use_cache is True

@pytest.mark.filterwarnings('ignore:.*gradient_checkpointing_enable')
@mixers
def test_no_cache_is_made_unless_the_configuration_asks_for_it(to, monkeypatch):
    m,x = copy.deepcopy(model(to, [0,2])),prompts('right')
    m.config.use_cache = False                                           # as Trainer sets it
    want = m(**x, output_hidden_states=True).hidden_states
    def no(*_): raise AssertionError('a cache')
    with monkeypatch.context() as mp:
        mp.setattr(MixerCacheLayer, '__init__', no)
        out = m(**x, output_hidden_states=True)
        assert out.past_key_values is None and all(map(torch.equal, out.hidden_states, want))
        m.train().requires_grad_(True)
        out = m(**x, labels=x['input_ids'])
        out.loss.backward()
        assert out.past_key_values is None and all(p.grad is not None for p in m.parameters())
    m.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    assert m(**x, labels=x['input_ids'], use_cache=True).past_key_values is None
    whole = m.eval()(**x, use_cache=True, output_hidden_states=True)     # asked for, it changes rounding at most
    for a,b in zip(whole.hidden_states, want): close(a[x['attention_mask'].bool()], b[x['attention_mask'].bool()])

@mixers
@layouts
def test_a_plain_call_returns_a_cache_as_that_of_the_source(to, layers):
    m,x = model(to, layers),prompts('right')
    out = m(**x)
    assert out.past_key_values.get_seq_length()==source()(**x).past_key_values.get_seq_length()==N
    assert torch.equal(out.logits, m(**x, use_cache=False).logits)
    ids = x['input_ids'][:1]
    close(m(ids[:,5:], past_key_values=m(ids[:,:5]).past_key_values).logits, m(ids).logits[:,5:])

@mixers
@layouts
@pytest.mark.parametrize('pads', ['none','left'])
def test_a_static_cache_gives_the_same_tokens(to, layers, pads):
    m,x = model(to, layers),prompts(pads)
    for way in ('greedy','beams'):
        assert torch.equal(write(m, x, **WAYS[way]), write(m, x, cache_implementation='static', **WAYS[way]))
    cache = StaticCache(m.config, N+2)
    for _ in range(2):                                                   # it can be used again
        y,cache = fed(m, *x.values(), [7,1,1,3], cache)
        close(y, fed(m, *x.values(), [12])[0])
        assert cache.get_seq_length()==N and cache.is_compileable
        cache.reset()
    filled = StaticCache(m.config, 2*N)
    source()(**x, past_key_values=filled)
    with pytest.raises(ValueError, match='of its model, got a StaticLayer'): m(**x, past_key_values=filled)

@pytest.mark.parametrize('to,layers', [('mamba2',[1,2]),('mamba',[0])])
def test_generation_compiles_to_one_graph(to, layers):
    m,x = model(to, layers),prompts('left')
    config = CompileConfig(fullgraph=True, backend='eager', mode=None)
    config._compile_all_devices = True
    counters.clear()
    got = write(m, x, cache_implementation='static', compile_config=config, max_new_tokens=4)
    assert torch.equal(got, write(m, x, max_new_tokens=4)) and counters['stats']['unique_graphs']==1

def test_identity_is_the_source_with_its_cache():
    s,x = convert(source(), to='identity'),prompts('left')
    assert torch.equal(write(s, x), write(source(), x)) and not s._is_stateful and s.config.use_cache==source().config.use_cache
    a,b = (m(**x, use_cache=True) for m in (s,source()))
    assert torch.equal(a.logits, b.logits) and all(torch.equal(p.keys, q.keys) for p,q in zip(a.past_key_values.layers, b.past_key_values.layers))

@mixers
def test_16_bit_models_keep_their_states_in_float32(to):
    m,x = copy.deepcopy(model(to, [0,2])).bfloat16(),prompts('left')
    ids,mask = x.values()
    y,cache = fed(m, ids, mask, [7,1,4])
    whole = m(ids, attention_mask=mask, position_ids=positions(mask)).logits
    assert y.dtype==torch.bfloat16 and (y-whole)[mask.bool()].abs().max()<0.05*whole.abs().max()
    kept = dict(s4d=torch.complex64, window=torch.long).get(to, torch.float32) # the window counts its tokens
    for i in (0,2): assert [t.dtype for t in cache.layers[i].state]==[torch.bfloat16,kept]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        m = m.float()
        y,cache = fed(m, ids, mask, [7,1,4])
    assert (y.float()-whole.float())[mask.bool()].abs().max()<0.05*whole.abs().max() and cache.layers[0].state.ssm.dtype==kept

# ---- what is refused

@mixers
@layouts
def test_what_a_state_cannot_do_is_an_error(to, layers):
    m,x = model(to, layers),prompts('none')
    one = {k: t[:1] for k,t in x.items()}
    with pytest.raises(ValueError, match='stateful'): write(m, one, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match='stateful'): write(m, one, assistant_model=source())
    with pytest.raises(ValueError, match='cannot remove tokens'): write(source(), one, assistant_model=m, max_new_tokens=20)
    with pytest.raises(ValueError, match='continuous batching'): m(**x, cache=object())
    cache = m(**x, use_cache=True).past_key_values
    cache.crop(0)
    close(m(x['input_ids'][:,:1], past_key_values=copy.deepcopy(cache)).logits[:,0], m(torch.cat([x['input_ids'], x['input_ids'][:,:1]], 1)).logits[:,-1])
    with pytest.raises(ValueError, match='cannot remove tokens'): cache.crop(-2)
    if cache.layers[0].get_seq_length()<N:                               # its softmax layers were cropped before the error came
        with pytest.raises(ValueError, match='different lengths'): m(x['input_ids'][:,:1], past_key_values=cache)

def test_caches_of_other_models_are_refused():
    m,x = model('mamba', [0]),prompts('none')
    softmax_cache = source()(**x, use_cache=True).past_key_values
    mixer_cache = m(**x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match='converted layer 0 needs .* got a DynamicLayer'): m(**x, past_key_values=softmax_cache)
    with pytest.raises(TypeError, match='from another model'): source()(x['input_ids'], past_key_values=mixer_cache)
    two = torch.block_diag(torch.ones(2,2), torch.ones(3,3)).tril().bool()[None,None]
    cache = m(x['input_ids'][:1,:4], use_cache=True).past_key_values
    mask = torch.cat([torch.ones(1,1,5,4, dtype=torch.bool), two], 3)
    with pytest.raises(ValueError, match='packed'): m(x['input_ids'][:1,4:9], attention_mask=mask, past_key_values=cache)

def test_models_that_read_both_ways_have_none():
    torch.manual_seed(0)
    s = convert(RobertaForMaskedLM(RobertaConfig(**size)), to='mamba', **args['mamba'])
    assert all(isinstance(m.mixer, Bidirectional) and m.layer is None for m in s.replacements.values()) and not s._is_stateful
    with pytest.raises(ValueError, match='no key-value cache'): s.roberta.encoder.layer[0].attention.self(torch.randn(1, 4, 32), past_key_values=DynamicCache())

def test_pads_that_enter_a_state_are_noticed(monkeypatch):
    monkeypatch.setattr(cald.mixers, 'zero_pads', lambda x,mask=None: x)
    with pytest.raises(AssertionError): test_a_text_in_pieces_is_the_text('mamba', None, 'left', 'sdpa')

@pytest.mark.parametrize('method', ['reorder_cache','batch_select_indices','batch_repeat_interleave'])
def test_rows_that_stay_behind_are_noticed(monkeypatch, method):
    monkeypatch.setattr(MixerCacheLayer, method, lambda *_: None)
    with pytest.raises((AssertionError,RuntimeError,ValueError)): test_states_follow_the_rows('mamba')
