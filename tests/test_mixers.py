"The mixers against references in float64 and against transformers; padding; that these tests notice mistakes."
import copy, logging, math
from types import SimpleNamespace

import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from cald import mixers,ops
from cald.convert import convert
from cald.mixers import Bidirectional,LinformerProjection,Mamba,Mamba2,padding_mask,reverse_padded
from cald.kernels.ops_cpp import scan_backend
from cald.kernels.conv import causal_conv
from cald.ops import (backend,linformer_attention,mix_rows,selective_scan,
                      selective_scan_recurrence,ssd,ssd_chunked,ssd_recurrence)

LENGTHS = (1,2,63,64,65,255,257)
f64 = torch.float64

@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv('CALD_SCAN', 'torch')  # the chunks of Mamba's scan; its C++ has test_scan.py

def ssd_inputs(b=2, l=10, h=4, p=3, g=2, n=5, decay=1., dt=2, dtype=f64):
    x,t,A,B,C,D = (torch.randn(s, dtype=f64) for s in [(b,l,h,p),(b,l,h),(h,),(b,l,g,n),(b,l,g,n),(h,)])
    return [t.to(dtype) for t in (x, F.softplus(t-dt), -decay*(1+15*A.sigmoid()), B, C, D)]

def scan_inputs(b=2, l=10, d=6, n=4, decay=1., dt=2, dtype=f64):
    u,t,A,B,C,D = (torch.randn(s, dtype=f64) for s in [(b,l,d),(b,l,d),(d,n),(b,l,n),(b,l,n),(d,)])
    return [t.to(dtype) for t in (u, F.softplus(t-dt), -decay*(1+15*A.sigmoid()), B, C, D)]

SCANS = dict(ssd=(ssd, ssd_recurrence, ssd_inputs, (2,4,3,5)), scan=(selective_scan, selective_scan_recurrence, scan_inputs, (2,6,4)))
scans = pytest.mark.parametrize('name', SCANS)

def rms(a, b): return ((a.double()-b).norm()/b.norm().clamp(min=1e-30)).item()

def halved(seq, i): return [t[:,i] if t.ndim>2 else t for t in seq] # A and D have no length

# --- scans -----------------------------------------------------------------------------------------------------------------------

def same_as_recurrence(name, l, **args):
    "Outputs, states and gradients in float64, with and without a state to start from"
    fast,slow,make,shape = SCANS[name]
    for state in (None, torch.randn(shape, dtype=f64, requires_grad=True)):
        a = [t.requires_grad_() for t in make(l=l)]
        wrt = a if state is None else [*a, state]
        res = []
        for f,kw in ((slow, {}),(fast, args)):
            y,S = f(*a, state, **kw)
            g = torch.autograd.grad((y*torch.linspace(1, 2, l).view(1, l, *[1]*(y.ndim-2))).sum()+S.sin().sum(), wrt)
            res.append([y, S, *g])
        for want,got in zip(*res): torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)

@scans
@pytest.mark.parametrize('l', LENGTHS)
def test_chunked_is_the_recurrence_in_float64(name, l): same_as_recurrence(name, l)

@scans
@pytest.mark.parametrize('chunk', (1,2,3,5,8,11,12,100))
def test_any_chunk_size(name, chunk): same_as_recurrence(name, 11, chunk=chunk)

@scans
@pytest.mark.parametrize('l', LENGTHS)
def test_float32_keeps_its_digits(name, l):
    "With the step sizes at the start of training; those of the tests above are ten times as large"
    fast,slow,make,_ = SCANS[name]
    a = [t.requires_grad_() for t in make(l=l, dt=4, dtype=torch.float32)]
    d = [t.detach().double().requires_grad_() for t in a]
    (y,S),(y64,S64) = fast(*a),slow(*d)
    assert rms(y, y64)<1e-6 and rms(S, S64)<1e-6
    for g,g64 in zip(torch.autograd.grad(y.sum(), a), torch.autograd.grad(y64.sum(), d)): assert rms(g, g64)<1e-5

@scans
@pytest.mark.parametrize('decay', (0., 1e-7, 1e2, 1e8, 1e30))
def test_extreme_decay(name, decay):
    fast,slow,make,_ = SCANS[name]
    a = [t.requires_grad_() for t in make(l=130, decay=decay, dtype=torch.float32)]
    y,S = fast(*a)
    y64,S64 = slow(*(t.detach().double() for t in a))
    assert rms(y, y64)<1e-5 and rms(S, S64)<1e-5
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum()+S.sum(), a))

@scans
def test_slow_decay_after_fast_decay(name):
    "Differences of a cumulative sum that has grown large"
    fast,slow,make,_ = SCANS[name]
    a = make(l=64, dtype=torch.float32)
    a[1][:,:20] *= 50
    a[1][:,20:] *= 1e-2
    assert rms(fast(*a)[0], slow(*(t.double() for t in a))[0])<1e-4

@scans
def test_gradcheck(name):
    fast,_,_,_ = SCANS[name]
    a = ssd_inputs(b=1, l=4, h=2, p=2, g=1, n=2) if name=='ssd' else scan_inputs(b=1, l=4, d=2, n=2)
    state = torch.randn((1,2,2,2) if name=='ssd' else (1,2,2), dtype=f64)
    assert torch.autograd.gradcheck(lambda *a: fast(*a, chunk=3), [t.requires_grad_() for t in (*a, state)])

@scans
@pytest.mark.parametrize('cut', (1,6,7,13,19))
def test_the_state_continues_the_sequence(name, cut):
    fast,_,make,_ = SCANS[name]
    a = make(l=20)
    y,S = fast(*a, chunk=7)
    y1,S1 = fast(*halved(a, slice(0,cut)), chunk=7)
    y2,S2 = fast(*halved(a, slice(cut,None)), S1, chunk=7)
    torch.testing.assert_close(torch.cat([y1,y2], 1), y)
    torch.testing.assert_close(S2, S)

@scans
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_sixteen_bits_in_and_out_but_not_between(name, dtype):
    fast,slow,make,_ = SCANS[name]
    a = make(l=257, dtype=dtype)
    y,S = fast(*a)
    y64,S64 = slow(*(t.double() for t in a))
    assert y.dtype==dtype and S.dtype==torch.float32
    assert rms(y, y64)<3e-3 and rms(S, S64)<1e-5     # the rounding of the outputs, not of 257 steps

@scans
def test_autocast_does_not_reach_into_a_scan(name):
    fast,_,make,_ = SCANS[name]
    a = make(l=70, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16): y,_ = fast(*a)
    assert torch.equal(y, fast(*a)[0])

class Count(TorchDispatchMode):
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): self.n += 1; return func(*args, **(kwargs or {}))

@scans
def test_no_loop_over_the_length(name):
    "Operations grow with the number of chunks, by a few each"
    fast,_,make,_ = SCANS[name]
    n = {}
    for l in (512,1024):
        a = make(l=l, dtype=torch.float32)
        with Count() as c: fast(*a)
        n[l] = c.n
    assert n[1024]-n[512] < 512/4

def test_as_transformers_mamba2_chunk_scan():
    scan = pytest.importorskip('transformers.models.mamba2.modeling_mamba2').mamba2_chunk_scan
    for l in (5,64,100):
        x,dt,A,B,C,D = ssd_inputs(l=l, dtype=torch.float32)
        torch.testing.assert_close(ssd(x,dt,A,B,C,D)[0], scan(x, dt, A, B, C, chunk_size=32, D=D), rtol=1e-4, atol=1e-4)

def loses_the_state(Z, decay, S=None): return torch.zeros_like(Z),ops_pass_states(Z, decay, S)[1]
def decays_twice(Z, decay, S=None): return ops_pass_states(Z, decay**2, S)
def pads_in_front(t, m, q): return F.pad(t, (0,0)*(t.ndim-2)+(m*q-t.shape[1],0)).unflatten(1, (m,q))
def drops_the_last(t, m, q):
    return ops_chunks(torch.cat([t[:,:-1], torch.zeros_like(t[:,:1])], 1) if m*q>t.shape[1] else t, m, q)
def also_the_future(cum): return (cum[...,:,None]-cum[...,None,:]).clamp(max=0).exp()
ops_pass_states,ops_chunks = ops.pass_states,ops.reshape_into_chunks

MISTAKES = [('pass_states',loses_the_state), ('pass_states',decays_twice), ('reshape_into_chunks',pads_in_front),
            ('reshape_into_chunks',drops_the_last), ('decay_matrix',also_the_future)]

@pytest.mark.parametrize('name,wrong', MISTAKES)
def test_a_wrong_scan_is_noticed(monkeypatch, name, wrong):
    monkeypatch.setattr(ops, name, wrong)
    with pytest.raises(AssertionError): same_as_recurrence('ssd', 65)

@pytest.mark.parametrize('wrong', (pads_in_front, drops_the_last))
def test_a_wrong_scan_of_mamba_is_noticed(monkeypatch, wrong):
    monkeypatch.setattr(ops, 'reshape_into_chunks', wrong)
    with pytest.raises(AssertionError): same_as_recurrence('scan', 65)

# --- kernels ---------------------------------------------------------------------------------------------------------------------

def kernel_ssd(x, dt, A, B, C, chunk_size, D=None, initial_states=None, return_final_states=False):
    "With the arguments and layout of mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined"
    b,l,h,p = x.shape
    assert dt.shape==(b,l,h) and A.shape==(h,) and B.shape==C.shape and B.shape[:2]==(b,l) and D.shape==(h,) and isinstance(chunk_size, int)
    assert initial_states is None or initial_states.shape==(b,h,p,B.shape[3])
    y,S = ssd_recurrence(x, dt, A, B, C, D, initial_states)
    return (y,S) if return_final_states else y

def kernel_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    "With the arguments and layout of mamba_ssm.ops.selective_scan_interface.selective_scan_fn"
    b,d,l = u.shape
    assert delta.shape==(b,d,l) and A.shape[0]==d and B.shape==C.shape==(b,A.shape[1],l) and u.is_contiguous() and not delta_softplus
    y,S = selective_scan_recurrence(u.mT, delta.mT, A, B.mT, C.mT, D)
    return (y.mT,S) if return_last_state else y.mT

@scans
def test_the_kernels_get_what_they_expect(monkeypatch, name):
    fast,_,make,shape = SCANS[name]
    a,state = make(l=9, dtype=torch.float32),torch.randn(shape)
    want = [fast(*a),fast(*a, state)]
    called = []
    def counted(name, f): return lambda *a, **k: called.append(name) or f(*a, **k)
    fake = SimpleNamespace(ssd=counted('ssd', kernel_ssd), scan=counted('scan', kernel_scan))
    monkeypatch.setattr(ops, 'mamba_ssm_kernels', lambda: fake)
    monkeypatch.setattr(ops, 'backend', lambda device: 'mamba_ssm')
    got = [fast(*a),fast(*a, state)]
    assert called==(['ssd','ssd'] if name=='ssd' else ['scan'])  # mamba_ssm's Mamba-1 scan takes no state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('scale', (1e3, 1e5, 1e38))
def test_chunks_are_precise_after_very_large_steps(scale):
    x,dt,A,B,C,D = (t.float() for t in ssd_inputs(l=200))
    dt = torch.where(torch.rand_like(dt)<.1, dt*scale, dt)
    x = torch.where(dt[...,None]>1e6, 0, x)
    a = [t.requires_grad_() for t in (x,dt,A,B,C,D)]
    (y,S),(want,last) = ssd_chunked(*a),ssd_recurrence(*(t.double() for t in a))
    for got,exact in ((y,want),(S,last)): assert (got-exact).norm()/exact.norm()<2e-6
    if scale<1e6: assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), a))

def test_ordinary_decays_are_differences_of_one_sum_to_the_bit():
    a = -16*torch.rand(3, 2, 50)
    cum = a.cumsum(-1)
    assert torch.equal(ops.decay_matrix(a), (cum[...,:,None]-cum[...,None,:]).tril().exp().tril())

def test_the_backend_is_logged_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO, 'cald.ops')
    ops._log_backend.cache_clear()
    assert backend()==backend('cpu')==scan_backend()
    monkeypatch.setattr(ops, 'mamba_ssm_kernels', lambda: None)
    assert backend('cuda')==backend('cuda:1')=='torch'
    assert [r.levelname for r in caplog.records]==['WARNING'] and '.[cuda]' in caplog.text
    monkeypatch.setattr(ops, 'mamba_ssm_kernels', lambda: SimpleNamespace())
    assert backend('cuda')=='mamba_ssm' and backend('cpu')==scan_backend()

# --- masks and reversal ------------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1,1,1,1,1],[1,1,1,0,0],[1,0,0,0,0]]).bool()

@pytest.mark.parametrize('keep', (MASK, MASK.flip(1), torch.ones_like(MASK)), ids=('behind','in front','none'))
@pytest.mark.parametrize('causal', (False, True))
def test_every_form_of_mask(keep, causal):
    b,l = keep.shape
    grid = keep[:,None,None].expand(b, 1, l, l)
    if causal: grid = grid & torch.ones(l, l).tril().bool()
    low = torch.finfo(torch.float32).min
    forms = [grid, grid.expand(b, 4, l, l), torch.zeros(b, 1, l, l).masked_fill(~grid, low), torch.zeros(b, 1, l, l).masked_fill(~grid, -math.inf),
             (1.-grid.float())*-10000, keep, keep.long(), keep.float()]
    opened = grid.masked_fill(~grid.any(-1, keepdim=True), True)   # rows with nothing to see, opened
    for m in [*forms, opened]:
        got = padding_mask(m, b, l)
        assert got.dtype==torch.bool and torch.equal(got, keep)

def test_masks_one_for_all_or_wrong():
    assert torch.equal(padding_mask(MASK[1:2], 3, 5), MASK[1:2].expand(3, 5))
    assert padding_mask(None, 3, 5) is None
    for bad in (MASK[:2], MASK[:,:4], MASK[None], torch.ones(3, 1, 5, 7).bool()):
        with pytest.raises(ValueError, match='does not fit a batch of 3 x 5'): padding_mask(bad, 3, 5)
    with pytest.raises(TypeError, match='sdpa'): padding_mask(object(), 3, 5)

def test_reversal_by_hand():
    x = torch.arange(1, 6).expand(3, 5)
    assert reverse_padded(x, MASK).tolist()==[[5,4,3,2,1],[3,2,1,0,0],[1,0,0,0,0]]
    assert reverse_padded(x, MASK.flip(1)).tolist()==[[5,4,3,2,1],[0,0,5,4,3],[0,0,0,0,5]]
    assert torch.equal(reverse_padded(x), x.flip(1))
    assert reverse_padded(x, torch.zeros_like(MASK)).eq(0).all()

def test_reversal_twice_and_its_gradient():
    x = torch.randn(3, 5, 2, 4, dtype=f64, requires_grad=True)
    gaps = torch.tensor([[1,0,1,1,0],[0,1,0,1,1],[0,0,0,0,0]]).bool()
    assert reverse_padded(torch.arange(1, 6).expand(3, 5), gaps).tolist()==[[4,0,3,1,0],[0,5,0,4,2],[0]*5]
    for m in (MASK, MASK.flip(1), gaps):
        once = reverse_padded(x, m)
        assert torch.equal(reverse_padded(once, m), x.masked_fill(~m[...,None,None], 0))
        assert torch.autograd.gradcheck(lambda x: reverse_padded(x, m), x)

# --- blocks ------------------------------------------------------------------------------------------------------------------------

BLOCKS = {
    'mamba2':        lambda: Mamba2(8, d_state=4, headdim=4, chunk=4),
    'mamba2 bias':   lambda: Mamba2(8, d_state=4, headdim=4, ngroups=2, bias=True, expand=1),
    'mamba':         lambda: Mamba(8, d_state=4, chunk=4),
    'mamba bias':    lambda: Mamba(8, d_state=4, d_inner=10, dt_rank=3, bias=True),
    'bi mamba2':     lambda: Bidirectional(lambda: Mamba2(8, d_state=4, headdim=4, chunk=4)),
    'bi mamba2 res': lambda: Bidirectional(lambda: Mamba2(8, d_state=4, headdim=4, bias=True), residual=True),
    'bi mamba':      lambda: Bidirectional(lambda: Mamba(8, d_state=4, chunk=4))}

def alone_as_in_a_batch(m, front=False):
    "Outputs and the gradients of all weights, with NaN in the padding"
    m,x,n = m.double(),torch.randn(4, 9, 8, dtype=f64),[9,5,1,8]
    mask = torch.arange(9)<torch.tensor(n)[:,None]
    alone = torch.cat([m(r[None,:k])[0] for r,k in zip(x, n)])
    weight = torch.randn_like(alone)
    want = torch.autograd.grad((alone*weight).sum(), list(m.parameters()))
    x = x.masked_fill(~mask[...,None], math.nan)
    if front: x,mask = torch.stack([r.roll(9-k, 0) for r,k in zip(x, n)]),mask.flip(1)
    y = m(x, mask)
    got = torch.autograd.grad((y[mask]*weight).sum(), list(m.parameters()))
    torch.testing.assert_close(y[mask], alone, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    assert (y[~mask]==0).all()

@pytest.mark.parametrize('front', (False, True), ids=('behind','in front'))
@pytest.mark.parametrize('name', BLOCKS)
def test_a_sample_alone_is_the_sample_in_a_batch(name, front): alone_as_in_a_batch(BLOCKS[name](), front)

@pytest.mark.parametrize('name', BLOCKS)
def test_float32_too_and_an_empty_sample(name):
    m,x = BLOCKS[name](),torch.randn(3, 70, 8)
    mask = torch.arange(70)<torch.tensor([70,41,0])[:,None]
    y = m(x, mask)
    torch.testing.assert_close(y[1,:41], m(x[1:2,:41])[0], rtol=1e-5, atol=1e-6)
    assert y.isfinite().all() and (y[2]==0).all()

def flips_all(x, mask=None): return x.flip(1)
def keeps_pads(x, mask=None): # tokens in the right place, pads not emptied
    return x if mask is None else torch.where(mask[...,None], reverse_padded(x, mask), x.flip(1))
def off_by_one(x, mask=None): return reverse_padded(x, mask) if mask is None else reverse_padded(x.roll(1, 1), mask)
def forgets_to(x, mask=None): return x
def by_longest(x, mask=None): return x if mask is None else reverse_padded(x, mask[:1].expand_as(mask))

@pytest.mark.parametrize('wrong', (flips_all, off_by_one, by_longest, keeps_pads))
def test_a_wrong_reversal_is_noticed(monkeypatch, wrong):
    monkeypatch.setattr(mixers, 'reverse_padded', wrong)
    with pytest.raises(AssertionError): alone_as_in_a_batch(BLOCKS['bi mamba2']())

def test_both_directions_see_all_and_mirror():
    one = Mamba2(8, d_state=4, headdim=4).double()
    bi,x = Bidirectional(lambda: one),torch.randn(2, 9, 8, dtype=f64)
    torch.testing.assert_close(bi(x.flip(1)), bi(x).flip(1))
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(mixers, 'reverse_padded', forgets_to)
        assert (bi(x.flip(1))-bi(x).flip(1)).abs().max()>1e-3

@pytest.mark.parametrize('cls', (Mamba2, Mamba))
def test_causal(cls):
    m,x = cls(64).double(),torch.randn(1, 40, 64, dtype=f64)
    y,late = m(x),x.clone()
    late[:,25:] += 1
    assert torch.equal(m(late)[:,:25], y[:,:25]) and (m(late)[:,25:]!=y[:,25:]).any(-1).all()

def test_conv_is_conv1d_and_continues():
    conv,x = nn.Conv1d(6, 6, 4, groups=6, padding=3).double(),torch.randn(2, 9, 6, dtype=f64)
    for l in (1,2,3,9): torch.testing.assert_close(causal_conv(x[:,:l], conv.weight, conv.bias)[0], conv(x[:,:l].mT)[...,:l].mT)
    y,state = causal_conv(x[:,:2], conv.weight, conv.bias)
    assert state.shape==(2,3,6)
    for t in range(2, 9):
        step,state = causal_conv(x[:,t:t+1], conv.weight, conv.bias, state)
        y = torch.cat([y, step], 1)
    torch.testing.assert_close(y, causal_conv(x, conv.weight, conv.bias)[0])

# Names and shapes as `mamba_ssm` 2.3.2 builds them (mamba_ssm/modules/mamba2.py and mamba_simple.py), which cannot be imported without CUDA
def mamba2_shapes(d, n, e, h, g, w):
    inner = e*d
    return {'dt_bias':(inner//h,), 'A_log':(inner//h,), 'D':(inner//h,), 'in_proj.weight':(2*inner+2*g*n+inner//h, d),
            'conv1d.weight':(inner+2*g*n, 1, w), 'conv1d.bias':(inner+2*g*n,), 'norm.weight':(inner,), 'out_proj.weight':(d, inner)}

def mamba_shapes(d, n, e, w):
    inner,rank = e*d,math.ceil(d/16)
    return {'A_log':(inner,n), 'D':(inner,), 'in_proj.weight':(2*inner,d), 'conv1d.weight':(inner,1,w), 'conv1d.bias':(inner,),
            'x_proj.weight':(rank+2*n,inner), 'dt_proj.weight':(inner,rank), 'dt_proj.bias':(inner,), 'out_proj.weight':(d,inner)}

def shapes(m): return {n: tuple(p.shape) for n,p in m.named_parameters()}

def test_names_and_shapes_are_mamba_ssms():
    assert shapes(Mamba2(64))==mamba2_shapes(64, 128, 2, 64, 1, 4)
    assert shapes(Mamba2(96, d_state=16, d_conv=3, expand=1, headdim=24, ngroups=2))==mamba2_shapes(96, 16, 1, 24, 2, 3)
    assert shapes(Mamba(72))==mamba_shapes(72, 16, 2, 4)
    assert set(shapes(Mamba2(64, bias=True)))-set(shapes(Mamba2(64)))=={'in_proj.bias','out_proj.bias'}
    paper = Mamba2(1024, expand=1)  # of Table 3: two of these in a layer
    assert shapes(paper)==mamba2_shapes(1024, 128, 1, 64, 1, 4) and paper.nheads==16

def test_starting_values_are_mamba_ssms():
    m = Mamba2(1024, headdim=4)
    assert 1 <= m.A_log.exp().min() < 1.5 and 15.5 < m.A_log.exp().max() <= 16.001
    dt = F.softplus(m.dt_bias)
    assert 0.00099 < dt.min() < 0.0015 and 0.08 < dt.max() < 0.1001 and abs(dt.log().mean()-math.log(0.01))<0.2
    assert (m.D==1).all() and (m.norm.weight==1).all() and m.norm.eps==1e-5
    m = Mamba(1024)
    dt = F.softplus(m.dt_proj.bias)
    assert 0.00099 < dt.min() < 0.0015 and 0.08 < dt.max() < 0.1001
    torch.testing.assert_close(m.A_log.exp(), torch.arange(1., 17).expand(2048, 16))
    assert (m.D==1).all() and m.dt_rank==64 and 0.124 < m.dt_proj.weight.abs().max() <= 0.125

def test_random_numbers_are_drawn_in_mamba_ssms_order():
    torch.manual_seed(3)
    m = Mamba2(64, d_state=16, headdim=16)
    torch.manual_seed(3)
    lin,conv = nn.Linear(64, 128+160+8, bias=False),nn.Conv1d(160, 160, 4, groups=160)
    u,A,out = torch.rand(8),torch.empty(8).uniform_(1, 16),nn.Linear(128, 64, bias=False)
    assert torch.equal(m.in_proj.weight, lin.weight) and torch.equal(m.conv1d.weight, conv.weight) and torch.equal(m.conv1d.bias, conv.bias)
    torch.testing.assert_close(F.softplus(m.dt_bias), 0.001*100**u)
    torch.testing.assert_close(m.A_log.exp(), A)
    assert torch.equal(m.out_proj.weight, out.weight)

@pytest.mark.parametrize('cls,names', [(Mamba2, {'A_log','D','dt_bias'}), (Mamba, {'A_log','D'})])
def test_marks_against_weight_decay(cls, names):
    assert {n for n,p in cls(64).named_parameters() if getattr(p, '_no_weight_decay', False)}==names

def test_as_transformers_mamba2_with_the_same_weights():
    mod = pytest.importorskip('transformers.models.mamba2.modeling_mamba2')
    from transformers import Mamba2Config
    sizes = dict(hidden_size=32, expand=2, head_dim=16, num_heads=4, state_size=8, n_groups=1, conv_kernel=4, chunk_size=16)
    theirs = mod.Mamba2Mixer(Mamba2Config(**sizes), 0)
    ours,x = Mamba2(32, d_state=8, headdim=16),torch.randn(2, 41, 32)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    mask = torch.arange(41)<torch.tensor([41,23])[:,None]
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x, mask)[mask], theirs(x, attention_mask=mask.long())[mask], rtol=1e-4, atol=1e-5)

def test_as_transformers_mamba_with_the_same_weights():
    mod = pytest.importorskip('transformers.models.mamba.modeling_mamba')
    from transformers import MambaConfig
    theirs = mod.MambaMixer(MambaConfig(hidden_size=32, state_size=8, conv_kernel=4, intermediate_size=64), 0)
    ours,x = Mamba(32, d_state=8),torch.randn(2, 41, 32)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('name', ('mamba2','mamba','bi mamba2'))
def test_bf16_autocast_trains_with_parameters_in_float32(name, monkeypatch):
    m,x = BLOCKS[name](),torch.randn(2, 30, 8)
    for op in ('ssd','selective_scan'):
        def watch(u, dt, A, *a, op=getattr(mixers, op), **k):
            assert dt.dtype==A.dtype==torch.float32
            return op(u, dt, A, *a, **k)
        monkeypatch.setattr(mixers, op, watch)
    with torch.autocast('cpu', dtype=torch.bfloat16): y = m(x)
    assert y.dtype==torch.bfloat16 and rms(y, m(x).double().detach())<0.03
    y.float().pow(2).mean().backward()
    assert all(p.grad.dtype==torch.float32 and p.grad.isfinite().all() for p in m.parameters())

def test_wrong_sizes_raise():
    with pytest.raises(ValueError, match='headdim=48 does not divide the inner width 64'): Mamba2(64, expand=1, headdim=48)
    with pytest.raises(ValueError, match='ngroups=3 does not divide the 2 heads'): Mamba2(64, expand=2, ngroups=3)

# --- Linformer ---------------------------------------------------------------------------------------------------------------------

def linformer_inputs(b=3, h=2, l=7, d=4, k=3): return [torch.randn(s, dtype=f64, requires_grad=True) for s in [(b,h,l,d)]*3+[(l,k)]*2]

def linformer_by_sample(q, K, V, E, F_, mask):
    out = []
    for i,n in enumerate(mask.sum(1).tolist()):
        heads = []
        for j in range(q.shape[1]):
            keys,values = E[:n].T@K[i,j,:n]/math.sqrt(n),F_[:n].T@V[i,j,:n]/math.sqrt(n)
            heads.append(((q[i,j]@keys.T)/math.sqrt(q.shape[-1])).softmax(-1)@values)
        out.append(torch.stack(heads))
    return torch.stack(out)

def test_linformer_is_the_formula_sample_by_sample():
    a,mask = linformer_inputs(),torch.arange(7)<torch.tensor([7,4,1])[:,None]
    y,want = linformer_attention(*a, mask),linformer_by_sample(*a, mask)
    torch.testing.assert_close(y, want)
    g,g_want = (torch.autograd.grad((t*mask[:,None,:,None]).sin().sum(), a) for t in (y, want))
    torch.testing.assert_close(g, g_want)
    full = torch.ones_like(mask)
    torch.testing.assert_close(linformer_attention(*a), linformer_by_sample(*a, full))
    torch.testing.assert_close(linformer_attention(*a), linformer_attention(*a, full))

def test_linformer_does_not_see_pads_or_neighbours():
    q,K,V,E,F_ = (t.detach() for t in linformer_inputs(l=9))
    mask = torch.arange(9)<torch.tensor([9,5,2])[:,None]
    y = linformer_attention(q, K, V, E, F_, mask)
    noisy = [t.masked_fill(~mask[:,None,:,None], math.nan) for t in (K,V)]
    assert torch.equal(linformer_attention(q, *noisy, E, F_, mask), y)
    torch.testing.assert_close(linformer_attention(q[1:2,:,:5], K[1:2,:,:5], V[1:2,:,:5], E[:5], F_[:5])[0], y[1,:,:5])

def test_linformer_with_a_slot_for_each_token_is_full_attention():
    q,K,V,_,_ = linformer_inputs()
    E = torch.eye(7, dtype=f64)*7**0.5
    torch.testing.assert_close(linformer_attention(q, K, V, E, E), (q@K.mT/2.).softmax(-1)@V)  # headdim 4
    assert (linformer_attention(q, K, V, torch.eye(7, dtype=f64), torch.eye(7, dtype=f64))-(q@K.mT/2.).softmax(-1)@V).abs().max()>1e-2

def test_linformer_errors():
    a,mask = linformer_inputs(),torch.arange(7)<torch.tensor([7,4,1])[:,None]
    with pytest.raises(ValueError, match='padding at the end'): linformer_attention(*a, mask.flip(1))
    with pytest.raises(ValueError, match='9 positions, but this Linformer was made for at most 8'): LinformerProjection(8, k=2)(9)
    with pytest.raises(ValueError, match="'none', 'kv' or 'layer'"): LinformerProjection(8, k=2, share='all')

def test_linformer_keeps_the_scale_of_its_inputs():
    x = torch.randn(2, 4, 200, 16)
    mask = torch.arange(200)<torch.tensor([200,50])[:,None]
    y = mix_rows(x, torch.randn(200, 64), mask)
    for r in y: assert 0.9<r.std()<1.1

def test_linformer_dropout_only_when_asked():
    a = linformer_inputs()
    assert torch.equal(linformer_attention(*a), linformer_attention(*a))
    assert not torch.equal(linformer_attention(*a, dropout=0.5), linformer_attention(*a, dropout=0.5))

@pytest.mark.parametrize('share,n', [('none',6),('kv',3),('layer',1)])
def test_linformer_sharing(share, n):
    layers = LinformerProjection.make(3, max_length=8, k=2, share=share)
    net = nn.ModuleList(layers)
    assert len(list(net.parameters()))==n
    loss = sum(t.sum() for m in copy.deepcopy(net) for t in m(5))
    copied = copy.deepcopy(net)
    assert len(list(copied.parameters()))==n and not {id(p) for p in net.parameters()} & {id(p) for p in copied.parameters()}
    assert loss.isfinite() and all(t.shape==(5,2) for m in net for t in m(5))
    with torch.no_grad(): layers[0].E.zero_()
    zero = [[bool((t==0).all()) for t in m(8)] for m in layers]
    assert zero=={'none':[[True,False]]+[[False]*2]*2, 'kv':[[True]*2]+[[False]*2]*2, 'layer':[[True]*2]*3}[share]

@pytest.mark.parametrize('share', ('none','kv','layer'))
def test_two_models_share_nothing(share):
    one,two = (LinformerProjection.make(2, max_length=8, k=2, share=share) for _ in range(2))
    before = [t.clone() for m in two for t in m(8)]
    with torch.no_grad():
        for m in one:
            for p in m.parameters(): p.add_(1)
    assert all(torch.equal(t, b) for t,b in zip((t for m in two for t in m(8)), before))
    assert not torch.equal(one[0].E-1, two[0].E)

# --- Linformer in a model ----------------------------------------------------------------------------------------------------------

def roberta(length=12):
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=length+2, initializer_range=0.5, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)).double().eval()

def texts(*lengths):
    mask = torch.arange(max(lengths))<torch.tensor(lengths)[:,None]
    return dict(input_ids=torch.randint(2, 30, mask.shape).where(mask, 1), attention_mask=mask.long(), labels=torch.arange(len(lengths))%2)

def attentions(m): return [l.attention.self for l in m.roberta.encoder.layer]

@pytest.mark.parametrize('share', ('none','kv','layer'))
def test_a_converted_roberta_attends_by_the_formula_with_its_own_query_key_and_value(share):
    m,lengths,got = roberta(),(9,5,1),[]
    s = convert(m, to='linformer', k=3, share=share, seed=0)
    hooks = [a.register_forward_hook(lambda mod, args, kw, out: got.append((args[0] if args else kw['hidden_states'], out[0])), with_kwargs=True)
             for a in attentions(s)]
    with torch.no_grad(): s(**texts(*lengths))
    assert len(got)==len(hooks)==3
    for (x,y),old,new in zip(got, attentions(m), attentions(s)):
        E,F_ = new.mixer.E,(new.mixer.F if share=='none' else new.mixer.E)
        for i,n in enumerate(lengths):
            for head in (slice(0,8),slice(8,16)):
                q,k,v = (f(x[i,:n])[:,head] for f in (old.query,old.key,old.value))
                want = (q@(E[:n].T@k/math.sqrt(n)).T/math.sqrt(8)).softmax(-1)@(F_[:n].T@v/math.sqrt(n))
                torch.testing.assert_close(y[i,:n,head], want, rtol=1e-10, atol=1e-12)

@pytest.mark.parametrize('share', ('none','kv','layer'))
def test_a_roberta_with_a_slot_for_each_token_is_the_roberta(share):
    m,n = roberta(),7
    s,x = convert(m, to='linformer', k=n, share=share, seed=0),texts(n, n, n)
    with torch.no_grad():
        for a in attentions(s):
            for p in a.mixer.parameters(): p.zero_()[:n] = n**0.5*torch.eye(n, dtype=f64)
        want,got = (f(**x, output_hidden_states=True) for f in (m,s))
        short = s(**texts(n-1)).logits-m(**texts(n-1)).logits # one slot is empty and takes part
    for a,b in zip((got.logits,*got.hidden_states), (want.logits,*want.hidden_states)): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert short.abs().max()>1e-3

def storages(m): return {p.untyped_storage().data_ptr() for p in m.parameters()}
def matrices(m): return {t.data_ptr() for a in attentions(m) for t in a.mixer(4)}
def descend(m, x, opt=None):
    opt = torch.optim.SGD(m.parameters(), lr=0.5)
    m(**x).loss.backward()
    grads = {n: p.grad.clone() for n,p in m.named_parameters(remove_duplicate=False)}
    opt.step()
    return grads

def test_all_layers_of_a_model_have_one_matrix_and_no_two_models_do(tmp_path):
    "Made from one source with one seed, of another size, copied, and read from one folder; before and after a step of training"
    m,x = roberta(),texts(9, 5, 1)
    made = dict(one=convert(m, to='linformer', k=3, share='layer', seed=0), twin=convert(m, to='linformer', k=3, share='layer', seed=0),
                wide=convert(m, to='linformer', k=5, share='layer', seed=0))
    made['one'].save_pretrained(tmp_path)
    for n in ('read','again'): made[n] = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=f64).eval()
    made['copy'] = copy.deepcopy(made['one'])
    def apart():
        assert sum(map(len, map(storages, made.values())))==len(set.union(*map(storages, made.values())))
        assert [len(matrices(s)) for s in made.values()]==[1]*len(made) and len(set.union(*map(matrices, made.values())))==len(made)
    apart()
    before = {n: [p.detach().clone() for p in s.parameters()] for n,s in made.items()}
    one = attentions(made['one'])[0].mixer.E
    untied = convert(m, to='linformer', k=3, share='none', seed=1)
    with torch.no_grad():
        for a in attentions(untied): a.mixer.E.copy_(one); a.mixer.F.copy_(one)
    parts = [g for n,g in descend(untied, x).items() if '.mixer.' in n]
    grad = descend(made['one'], x)['roberta.encoder.layer.2.attention.self.mixer.E']
    assert len(parts)==6
    torch.testing.assert_close(grad, sum(parts), rtol=1e-10, atol=1e-14) # a sum over keys and values of all layers
    for n,s in made.items():
        kept = [torch.equal(p, q) for p,q in zip(s.parameters(), before[n])]
        assert not any(kept) if n=='one' else all(kept), n
    apart()
    made['one'].save_pretrained(tmp_path/'later')
    made['later'] = AutoModelForSequenceClassification.from_pretrained(tmp_path/'later', dtype=f64).eval()
    apart()
    for s in (made['one'],made['later']): s.zero_grad(); descend(s, x)
    for p,q in zip(made['one'].parameters(), made['later'].parameters(), strict=True): assert torch.equal(p, q)
    apart()
