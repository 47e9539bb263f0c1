"The selective scan in C++ against the recurrence in float64; its build, and failures of the build."
import hashlib, functools, logging, math, os, re, shlex, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode

from cald import ops
from cald.kernels import ops_cpp as scan
from cald.mixers import Bidirectional,Mamba
from cald.ops import selective_scan,selective_scan_recurrence,ssd_recurrence
from cald.kernels.ops_cpp import cpp_scan,cpp_ssd,library,scan_backend
from common import BARE

f64 = torch.float64
needs_cpp = pytest.mark.skipif(library()[0] is None, reason=f'no C++ here: {library()[1]}')

@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.delenv('CALD_SCAN', raising=False)
    scan._log_backend.cache_clear()

def inputs(b=2, l=10, d=6, n=4, dt=.1, dtype=f64):
    u,s,A,B,C,D,h = (torch.randn(s, dtype=f64) for s in [(b,l,d),(b,l,d),(d,n),(b,l,n),(b,l,n),(d,),(b,d,n)])
    return [t.to(dtype) for t in (u, dt*s.sigmoid(), -16*A.sigmoid(), B, C, D, h)]

def results(f, args, gy, gstate):
    "Outputs, last state and the gradients of all arguments that are not None"
    args = [None if t is None else t.detach().requires_grad_() for t in args]
    y,S = f(*args)
    return [y.detach(), S.detach(), *torch.autograd.grad((y*gy).sum()+(S*gstate).sum(), [t for t in args if t is not None])]

def errors(args, f=cpp_scan):
    "Relative errors of y, last state and gradients against the recurrence in float64"
    b,l,d,n = *args[0].shape,args[2].shape[1]
    gy,gstate = torch.randn(b, l, d, dtype=args[0].dtype),torch.randn(b, d, n, dtype=args[0].dtype)
    want = results(selective_scan_recurrence, [None if a is None else a.double() for a in args], gy.double(), gstate.double())
    return [((g.double()-w).norm()/w.norm().clamp(min=1e-30)).item() for g,w in zip(results(f, args, gy, gstate), want)]

def in_threads(n, f, *args):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try: return f(*args)
    finally: torch.set_num_threads(before)

def close(args, f=cpp_scan):
    e = errors(args, f)
    out,grad = (1e-6,1e-5) if args[0].dtype==torch.float32 else (1e-12,1e-11)
    assert all(x<out for x in e[:2]) and all(x<grad for x in e[2:]), e # NaN too fails

def head_inputs(b=2, l=40, h=4, p=5, g=2, n=6, dtype=f64):
    x,s,A,B,C,D,S = (torch.randn(s, dtype=f64) for s in [(b,l,h,p),(b,l,h),(h,),(b,l,g,n),(b,l,g,n),(h,),(b,h,p,n)])
    return [t.to(dtype) for t in (x, .1*s.sigmoid(), -16*A.sigmoid(), B, C, D, S)]

def close_heads(args, f=cpp_ssd):
    gy,gstate = torch.randn_like(args[0]),torch.randn_like(args[-1])
    want = results(ssd_recurrence, [t.double() for t in args], gy.double(), gstate.double())
    eps = 1e-5 if args[0].dtype==torch.float32 else 1e-11
    for got,exact in zip(results(f, args, gy, gstate), want):
        assert (got.double()-exact).norm()<=eps*exact.norm().clamp(min=1e-30)

# --- values and gradients ------------------------------------------------------------------------------------------------------------

@needs_cpp
@pytest.mark.parametrize('dtype', (f64, torch.float32))
@pytest.mark.parametrize('l', (1,2,31,32,33,63,64,65,257))
def test_is_the_recurrence_at_every_length(l, dtype): close(inputs(3, l, dtype=dtype))

@needs_cpp
@pytest.mark.parametrize('dtype', (f64, torch.float32))
@pytest.mark.parametrize('d', (1,3,4,5,8,15,16,17,63,64,65,100,129))
@pytest.mark.parametrize('n', (1,4,16,17))
def test_is_the_recurrence_at_every_width(d, n, dtype): close(inputs(2, 35, d, n, dtype=dtype))

@needs_cpp
@pytest.mark.parametrize('chunk', (1,2,3,7,32,65,66,1000))
def test_any_chunk_size(chunk): close(inputs(2, 65, 20, 5), functools.partial(cpp_scan, chunk=chunk))

@needs_cpp
@pytest.mark.parametrize('without', ((5,),(6,),(5,6)))
def test_without_D_or_state(without): close([None if i in without else t for i,t in enumerate(inputs(l=40))])

@needs_cpp
@pytest.mark.parametrize('dt', (0., 1e-6, 1e-2, 1e2, 1e8, 1e30))
def test_steps_at_their_extremes(dt):
    a = inputs(2, 70, 20, 16, dtype=torch.float32)
    a[1] = a[1]*dt
    y,S = cpp_scan(*a)
    y64,S64 = selective_scan_recurrence(*(t.double() for t in a))
    for got,want in ((y,y64),(S,S64)): assert ((got.double()-want).norm()/want.norm()).item()<1e-6
    assert all(g.isfinite().all() for g in results(cpp_scan, a, torch.randn_like(y), torch.randn_like(S)))

@needs_cpp
def test_slow_decay_after_fast_decay():
    a = inputs(2, 128, 20, 16, dtype=torch.float32)
    a[1][:,:40] *= 1e4
    a[1][:,40:] *= 1e-3
    close(a)

@needs_cpp
@pytest.mark.parametrize('which', range(7))
def test_nan_is_not_lost(which):
    a = inputs(1, 40, 20, 4, dtype=torch.float32)
    a[which].view(-1)[0] = math.nan
    y,S = cpp_scan(*a)
    want = [t.isnan() for t in selective_scan_recurrence(*a)]
    assert torch.equal(y.isnan(), want[0]) and torch.equal(S.isnan(), want[1]) and (want[0].any() or want[1].any())

@needs_cpp
def test_gradcheck():
    assert torch.autograd.gradcheck(functools.partial(cpp_scan, chunk=3), [t.requires_grad_() for t in inputs(2, 5, 3, 2)])

@needs_cpp
@pytest.mark.parametrize('which', range(7))
def test_one_gradient_alone(which):
    a = inputs(2, 40, 10, 4)
    def only(f, part):
        b = [t.clone().requires_grad_(i==which) for i,t in enumerate(a)]
        out = f(*b)[part].sin().sum()
        return torch.autograd.grad(out, b[which])[0] if out.requires_grad else torch.zeros_like(b[which]) # C and D do not reach the last state
    for part in (0,1): torch.testing.assert_close(only(cpp_scan, part), only(selective_scan_recurrence, part))

@needs_cpp
def test_a_second_derivative_is_an_error():
    u,*a = inputs()
    y,_ = cpp_scan(u.requires_grad_(), *a)
    with pytest.raises(RuntimeError, match='differentiated once'): torch.autograd.grad(y.sum(), u, create_graph=True)

@needs_cpp
def test_an_argument_changed_before_the_backward_pass_is_noticed():
    u,*a = inputs()
    v = u.requires_grad_()*1
    y,_ = cpp_scan(v, *a)
    v.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): y.sum().backward()

@needs_cpp
@pytest.mark.parametrize('cut', (1,6,31,32,33,64))
def test_the_state_continues_the_sequence(cut):
    a = inputs(2, 70, 20, 16)
    y,S = cpp_scan(*a)
    def piece(s, state): return cpp_scan(*(t[:,s] if t.ndim==3 else t for t in a[:6]), state)
    y1,S1 = piece(slice(0,cut), a[6])
    y2,S2 = piece(slice(cut,None), S1)
    torch.testing.assert_close(torch.cat([y1,y2], 1), y)
    torch.testing.assert_close(S2, S)

@needs_cpp
def test_any_layout_in_memory():
    a = inputs(2, 40, 20, 16)
    gy,gS = torch.randn(2, 40, 20, dtype=f64),torch.randn(2, 20, 16, dtype=f64)
    strange = [t.mT.contiguous().mT if t.ndim>1 else t.repeat_interleave(2)[::2] for t in a]
    assert not any(t.is_contiguous() for t in strange)
    for g,w in zip(results(cpp_scan, strange, gy.mT.contiguous().mT, gS), results(cpp_scan, a, gy, gS)): assert torch.equal(g, w)
    assert torch.equal(cpp_scan(a[0][:1].expand(2, -1, -1), *a[1:])[0], cpp_scan(a[0][:1].repeat(2, 1, 1), *a[1:])[0])

@needs_cpp
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_sixteen_bits_in_and_out_but_not_between(dtype):
    a = [t.to(dtype).requires_grad_() for t in inputs(2, 257, 20, 4)]
    y,S = cpp_scan(*a)
    y64,S64 = selective_scan_recurrence(*(t.double() for t in a))
    assert y.dtype==dtype and S.dtype==torch.float32 and torch.equal(y, y64.to(dtype)) or ((y.double()-y64).norm()/y64.norm())<3e-3
    assert (S.double()-S64).norm()/S64.norm()<1e-6
    assert all(g.dtype==dtype and g.isfinite().all() for g in torch.autograd.grad(y.float().sum()+S.sum(), a))

@needs_cpp
def test_the_same_to_the_last_bit_with_any_number_of_threads():
    a,gy,gS = inputs(3, 100, 200, 16, dtype=torch.float32),torch.randn(3, 100, 200),torch.randn(3, 200, 16)
    before,found = torch.get_num_threads(),[]
    try:
        for n in (1,2,2,5):
            torch.set_num_threads(n)
            found.append(results(cpp_scan, a, gy, gS))
    finally: torch.set_num_threads(before)
    for r in found[1:]: assert all(torch.equal(x, y) for x,y in zip(r, found[0]))

@needs_cpp
def test_several_python_threads_at_once():
    many = [inputs(2, 60, 70, 16, dtype=torch.float32) for _ in range(8)]
    want = [cpp_scan(*a)[0] for a in many]
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(lambda a: cpp_scan(*a)[0], many*4))
    assert all(torch.equal(g, w) for g,w in zip(got, want*4))

WRONG = [
    (lambda a: a[:3]+[a[3][:,:5]]+a[4:], ValueError, r'B is \(2, 5, 4\); with u \(2, 10, 6\) and A \(6, 4\) it must be \(2, 10, 4\)'),
    (lambda a: a[:2]+[a[2].T]+a[3:], ValueError, r'A is \(4, 6\)'),
    (lambda a: a[:6]+[a[6][:1]], ValueError, r'state is \(1, 6, 4\)'),
    (lambda a: a[:5]+[a[5][:1]], ValueError, r'D is \(1,\)'),
    (lambda a: [a[0][0]]+a[1:], ValueError, r'u must be \(batch, length, d_inner\)'),
    (lambda a: [t[:,:0] if i in (0,1,3,4) else t for i,t in enumerate(a)], ValueError, 'no positions'),
    (lambda a: a[:1]+[a[1].float()]+a[2:], TypeError, 'dt is torch.float32, u is torch.float64'),
    (lambda a: [t.long() for t in a], TypeError, 'u is torch.int64'),
    (lambda a: a[:4]+[None], TypeError, 'C is a NoneType'),
    (lambda a: a[:2]+[a[2].tolist()]+a[3:], TypeError, 'A is a list'),
    (lambda a: a[:3]+[a[3].to('meta')]+a[4:], ValueError, 'B is on meta')]

@pytest.mark.parametrize('spoil,kind,message', WRONG)
def test_a_wrong_argument_is_named(spoil, kind, message):
    with pytest.raises(kind, match=message): cpp_scan(*spoil(inputs()))

@needs_cpp
def test_an_empty_batch():
    a = [t.requires_grad_() for t in inputs(b=0)]
    y,S = cpp_scan(*a)
    assert y.shape==(0,10,6) and S.shape==(0,6,4)
    assert [g.shape for g in torch.autograd.grad(y.sum()+S.sum(), a)]==[t.shape for t in a]

# --- in the mixers -------------------------------------------------------------------------------------------------------------------

class Count(TorchDispatchMode):
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None): self.n += 1; return func(*args, **(kwargs or {}))

@needs_cpp
def test_selective_scan_runs_it_and_CALD_SCAN_decides(monkeypatch):
    a,n = inputs(l=100),{}
    for choice in ('','cpp','torch'):
        monkeypatch.setenv('CALD_SCAN', choice)
        with Count() as c: y,S = selective_scan(*a)
        n[choice] = c.n
        torch.testing.assert_close((y,S), selective_scan_recurrence(*a))
    assert n['']==n['cpp']<20<n['torch']
    monkeypatch.setenv('CALD_SCAN', 'numba')
    with pytest.raises(ValueError, match="CALD_SCAN='numba': choose 'cpp' or 'torch'"): selective_scan(*a)

@needs_cpp
@pytest.mark.parametrize('autocast', (False, True))
def test_a_block_trains_as_it_does_with_torch(monkeypatch, autocast):
    m,x,mask = Bidirectional(lambda: Mamba(16)),torch.randn(3, 70, 16),torch.arange(70)<torch.tensor([70,41,1])[:,None]
    def gradients():
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast): y = m(x, mask)
        return [y.float(), *torch.autograd.grad(y.float().sin().sum(), list(m.parameters()))]
    got = gradients()
    monkeypatch.setenv('CALD_SCAN', 'torch')
    for g,w in zip(got, gradients()): assert ((g-w).norm()/w.norm())<(2e-2 if autocast else 1e-5)

@needs_cpp
def test_under_the_compiler_of_torch():
    m,x = Mamba(16),torch.randn(2, 40, 16)
    f = torch.compile(m, backend='eager')
    torch.testing.assert_close(f(x), m(x))
    for g,w in zip(*(torch.autograd.grad(h(x).sin().sum(), list(m.parameters())) for h in (f,m))): torch.testing.assert_close(g, w)

# --- wrong kernels are noticed -----------------------------------------------------------------------------------------------------

MISTAKES = {'the state is not passed on':   ('H[(n+r)*G+b] = h[r];', ';'),
            'a chunk starts one state late':('if (keep) std::memcpy(keep+g.kept(chunk)', 'if (keep && chunk) std::memcpy(keep+g.kept(chunk-1)'),
            'A without its step':          ('da[r] += s*w', 'da[r] += w'),
            'C reads the state before':    ('PC[t*R+r] += gy*H[(t+1)*R+r]', 'PC[t*R+r] += gy*H[t*R+r]'),
            'the gradient does not decay': ('g[r] *= decay(t, r)', 'g[r] *= 1'),
            'a lane is left out':          ('h[0] += h[1];', 'h[0] += W==2 ? Half{} : h[1];'),
            'the polynomial is short':     ('bias = 1023, degree = 13', 'bias = 1023, degree = 7')}

OF_HEADS = {'the rate is left out of the step':  ('DS[i] *= As[i%G]', 'DS[i] *= 1'),
            'the step is left out of the rate':  ('DA[i%G] += S[i]*DS[i]', 'DA[i%G] += DS[i]'),
            'every head uses the first B and C': ('which = group/parts(z)', 'which = 0')}

@needs_cpp
@pytest.mark.parametrize('mistake', [*MISTAKES,*OF_HEADS])
def test_a_wrong_kernel_is_noticed(monkeypatch, tmp_path, mistake):
    right,wrong = (MISTAKES|OF_HEADS)[mistake]
    assert right in scan.SOURCE
    monkeypatch.setattr(scan, 'SOURCE', scan.SOURCE.replace(right, wrong))
    scan.build(tmp_path/'wrong.so')
    lib = scan.load(tmp_path/'wrong.so')
    monkeypatch.setattr(scan, 'library', lambda: (lib,''))
    with pytest.raises(AssertionError):
        if mistake in OF_HEADS: close_heads(head_inputs())
        else: close(inputs(3, 65))

@needs_cpp
@pytest.mark.parametrize('dtype', (f64, torch.float32))
@pytest.mark.parametrize('sizes', [(2,33,6,32,1,32), (1,65,4,48,4,48), (2,40,3,70,3,17), (1,5,2,130,1,4), (1,1,2,3,2,1), (3,64,2,64,2,5)])
def test_heads_agree_with_the_recurrence(sizes, dtype): close_heads(head_inputs(*sizes, dtype))

@needs_cpp
def test_heads_of_extreme_steps():
    for dt in (0., 1e-8, 1e2, 1e8):
        args = head_inputs(dtype=torch.float32)
        args[1] = args[1]*dt
        y,S = cpp_ssd(*args)
        exact = ssd_recurrence(*(t.double() for t in args))
        for got,want in zip((y,S), exact): assert (got.double()-want).norm()<=1e-5*want.norm().clamp(min=1e-30)

@needs_cpp
def test_heads_do_not_depend_on_threads():
    args,found = head_inputs(3, 100, 6, 32, 2, 16, torch.float32),[]
    gy,gstate = torch.randn_like(args[0]),torch.randn_like(args[-1])
    for n in (1,2): found.append(in_threads(n, results, cpp_ssd, args, gy, gstate))
    assert all(map(torch.equal, *found))

@needs_cpp
def test_B_that_the_heads_cannot_share():
    x,dt,A,B,C,D,S = head_inputs(h=4, g=2)
    with pytest.raises(ValueError, match='3 pairs of B and C cannot be shared by 20 channels'):
        cpp_ssd(x, dt, A, B.repeat(1,1,2,1)[:,:,:3], C.repeat(1,1,2,1)[:,:,:3])

# --- building ------------------------------------------------------------------------------------------------------------------------

new_library = library.__wrapped__      # as in a new process

def wrapper(folder, text):
    "A compiler that is a shell script; $CXX in it is the real one"
    f = folder/'wrapped-c++'
    f.write_text(f'#!/bin/sh\nCXX={shlex.quote(shlex.join(scan.compiler()))}\n{text}\n')
    f.chmod(0o755)
    return str(f)

@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv('CALD_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'/'scan'

def built_files():
    "The library and its hash"
    return {scan.built_file(),scan.built_file().with_suffix('.sha256')}

def test_where_it_is_kept(monkeypatch, tmp_path):
    for k in ('CALD_CACHE','XDG_CACHE_HOME'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert scan.build_folder()==tmp_path/'.cache'/'cald'/'scan'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'x'))
    assert scan.build_folder()==tmp_path/'x'/'cald'/'scan'
    monkeypatch.setenv('CALD_CACHE', str(tmp_path/'c'))
    assert scan.build_folder()==tmp_path/'c'/'scan'
    file = scan.built_file()
    assert scan.built_file()==file
    for name,other in (('SOURCE','int x;'),('FLAGS',['-O1']),('processor',lambda: 'another')):
        with monkeypatch.context() as m:
            m.setattr(scan, name, other)
            assert scan.built_file()!=file, name
    with monkeypatch.context() as m:
        m.setattr(torch, '__version__', '2.9.9')
        assert scan.built_file()!=file

@needs_cpp
def test_built_once_and_found_again(cache, monkeypatch, capsys):
    assert new_library()[0] is not None and 'building the selective scan' in capsys.readouterr().err
    assert set(cache.iterdir())==built_files()
    monkeypatch.setenv('CXX', '/nonexistent/c++')
    assert new_library()[0] is not None and not capsys.readouterr().err

@needs_cpp
@pytest.mark.parametrize('damage', (b'', b'no library', b'\x7fELF'+bytes(60), 'cut', 'of another user', 'that anybody can write', 'without its hash', 'that cannot be loaded'))
def test_a_library_that_this_user_did_not_build_is_not_loaded(cache, damage):
    "A process that loads half of one would be killed"
    file = scan.built_file()
    scan.build(file) # and is not loaded here: it will be changed in place
    whole = file.read_bytes()
    planted = whole+b'planted'
    if isinstance(damage, bytes): planted = damage
    elif damage=='cut': planted = whole[:len(whole)//2]
    elif damage=='of another user':
        if os.geteuid(): pytest.skip('only root can give a file away')
        planted = whole
        os.chown(file, 12345, -1)
    elif damage=='that anybody can write':
        planted = whole
        file.chmod(0o777)
    elif damage=='that cannot be loaded':
        planted = b'no library'
        file.with_suffix('.sha256').write_text(hashlib.sha256(planted).hexdigest())
    else: file.with_suffix('.sha256').unlink()
    inode = file.stat().st_ino
    file.write_bytes(planted)
    p = start(ALONE)
    out,err = p.communicate(timeout=300)
    assert p.returncode==0 and out.split()==['cpp'] and 'building the selective scan' in err, err
    s = file.stat()
    assert s.st_ino!=inode and s.st_uid==os.geteuid() and not s.st_mode&0o022 and file.read_bytes()==whole

@needs_cpp
@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid()!=0, reason='only root can give a folder away')
def test_no_library_is_loaded_from_a_folder_of_another_user(cache):
    scan.build(scan.built_file())
    os.chown(cache, 12345, -1)
    lib,reason = new_library()
    assert lib is None and 'another user can write' in reason and 'CALD_CACHE' in reason

@needs_cpp
def test_others_lose_the_right_to_write_to_our_folder(cache):
    scan.build(scan.built_file())
    cache.chmod(0o777)
    assert new_library()[0] is not None and not cache.stat().st_mode&0o022

@needs_cpp
@pytest.mark.parametrize('refused', ('-fopenmp', '-march=native', 'libgomp'))
def test_options_that_a_compiler_refuses_are_left_out(cache, monkeypatch, caplog, refused):
    monkeypatch.setenv('CXX', wrapper(cache.parents[1], f'case "$*" in *{refused}*) echo "error: {refused}?" >&2; exit 1;; esac\nexec $CXX "$@"'))
    lib,why = new_library()
    assert why==''
    monkeypatch.setattr(scan, 'library', lambda: (lib,''))
    close(inputs())
    close(inputs(dtype=torch.float32))
    assert scan_backend()=='cpp' and (refused!='-fopenmp' or 'one thread' in caplog.text)

def reasons(cache, monkeypatch):
    own = cache.parents[1]
    yield dict(CXX='/nonexistent/c++'), 'OSError: CXX names /nonexistent/c.., which is not a program'
    yield dict(CXX='', PATH=str(own)), 'no C.. compiler was found'
    yield dict(CXX=wrapper(own, 'echo "scan.cpp:1: error: I cannot" >&2; exit 1')), 'the build failed: scan.cpp:1: error: I cannot'
    yield dict(CXX='"c++'), 'ValueError: No closing quotation'
    yield dict(CXX=wrapper(own, 'kill -9 $$')), 'the build failed: .* ended with -9'
    yield dict(CXX=wrapper(own, 'exit 0')), 'FileNotFoundError.*scan.so'
    yield dict(CXX=wrapper(own, 'echo nothing > scan.so')), 'OSError.*(header|short|ELF|file)'
    (own/'file').touch()
    yield dict(CALD_CACHE=str(own/'file')), 'NotADirectoryError|FileExistsError'

@needs_cpp
def test_library_returns_the_reason_of_a_failure(cache, monkeypatch):
    for env,reason in reasons(cache, monkeypatch):
        with monkeypatch.context() as m:
            for k,v in env.items(): m.setenv(k, v)
            lib,why = new_library()
        assert lib is None
        assert re.search(reason, why), why
        for f in cache.glob('*'): f.unlink()   # raises if a build left a folder
    assert new_library()[0] is not None

@needs_cpp
def test_a_compiler_that_hangs_times_out(cache, monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', wrapper(tmp_path, 'exec sleep 60'))
    start = time.time()
    monkeypatch.setattr(scan, 'build', functools.partial(scan.build, limit=.5))
    lib,why = new_library()
    assert lib is None and 'TimeoutExpired' in why and time.time()-start<20

def test_without_it_torch_runs_and_the_reason_is_logged_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO, 'cald.kernels.ops_cpp')
    monkeypatch.setattr(scan, 'library', lambda: (None,'the reason'))
    a = inputs(l=40)
    for _ in range(3): torch.testing.assert_close(selective_scan(*a), selective_scan_recurrence(*a))
    assert [r.levelname for r in caplog.records]==['WARNING'] and 'torch on cpu' in caplog.text and 'the reason' in caplog.text
    with pytest.raises(RuntimeError, match='the reason'): cpp_scan(*a)
    monkeypatch.setenv('CALD_SCAN', 'cpp')
    with pytest.raises(RuntimeError, match='CALD_SCAN=cpp, but .*the reason'): selective_scan(*a)

@needs_cpp
def test_the_backend_is_logged_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO, 'cald.kernels.ops_cpp')
    assert scan_backend()==scan_backend()=='cpp'
    monkeypatch.setenv('CALD_SCAN', 'torch')
    assert scan_backend()==scan_backend()=='torch'
    messages = [(r.levelname,r.getMessage()) for r in caplog.records]
    assert messages==[('INFO', 'the scans use cpp on cpu'), ('INFO', 'the scans use torch on cpu')]

# --- other processes -----------------------------------------------------------------------------------------------------------------

def start(code, **env):
    return subprocess.Popen([sys.executable,'-c',code], env={**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(Path(scan.__file__).parents[1]), **env},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

ALONE = BARE+'from cald.kernels.ops_cpp import scan_backend; print(scan_backend())' # without the rest of the package

def test_importing_builds_nothing_and_torch_runs_without_a_compiler(cache):
    p = start('''
import os, torch, cald
from cald.mixers import Mamba
from cald.kernels.ops_cpp import build_folder
m = Mamba(16)
assert not build_folder().exists()
y = m(torch.randn(1, 40, 16)); y.sum().backward()
print('trained', y.isfinite().all().item(), build_folder().exists())''', CXX='/nonexistent/c++')
    out,err = p.communicate(timeout=300)
    assert p.returncode==0, err
    assert out.split()[-3]=='trained' and out.split()[-2]=='True'
    assert err.count('the scans use torch on cpu')==1 and '/nonexistent/c++' in err

@needs_cpp
@pytest.mark.skipif(os.name!='posix', reason='kills a group of processes')
def test_a_killed_build_blocks_nobody(cache, tmp_path):
    p = start(ALONE, CXX=wrapper(tmp_path, 'touch "$CALD_CACHE/begun"\nexec sleep 600'))
    end = time.time()+120
    while not (cache.parent/'begun').exists() and time.time()<end: time.sleep(.05)
    os.killpg(p.pid, signal.SIGKILL)
    p.communicate(timeout=60)
    left = list(cache.iterdir())
    assert len(left)==1 and left[0].name.startswith('build-')
    assert new_library()[0] is not None and set(cache.iterdir())=={left[0],*built_files()}
    os.utime(left[0], (0,0))                  # a day later, the next build clears it away
    scan.build(scan.built_file())
    assert set(cache.iterdir())==built_files()

@needs_cpp
def test_several_processes_at_once(cache):
    ps = [start(ALONE) for _ in range(3)]
    for p in ps:
        out,err = p.communicate(timeout=300)
        assert p.returncode==0 and out.split()==['cpp'], err
    assert set(cache.iterdir())==built_files()
