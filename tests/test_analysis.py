"CKA on many shapes and partitions against the formula in float64, the record of hidden states, and the analysis notebooks as a user runs them"
import json, os
from pathlib import Path
import numpy as np, pandas as pd, papermill as pm, pytest, torch
from cald.paper.cka import CKA,cka,pwcca,Sums,svcca
from cald.hidden_states import collect_states,record_steps,sample_positions

root = Path(__file__).parents[1]

def naive(X, Y, debiased=True):
    "CKA from the n x n kernels, entry by entry as Song et al. (2012) write it"
    def hsic(X, Y):
        n,K,L = len(X),X@X.T,Y@Y.T
        if not debiased:
            H = np.eye(n)-1/n
            return np.trace(K@H@L@H)
        np.fill_diagonal(K, 0); np.fill_diagonal(L, 0)
        return (np.trace(K@L)+K.sum()*L.sum()/((n-1)*(n-2))-2/(n-2)*(K@L).sum())/(n*(n-3))
    X,Y = (a.double().numpy() for a in (X,Y))
    return hsic(X, Y)/np.sqrt(hsic(X, X)*hsic(Y, Y))

def data(n, dx, dy, seed=0, offset=0.):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, dx, generator=g)
    return X*torch.logspace(-1, 1, dx)+offset, X[:,:1]+torch.randn(n, dy, generator=g)-offset

@pytest.mark.parametrize('debiased', [True,False])
@pytest.mark.parametrize('n,dx,dy', [(4,1,1), (5,3,7), (64,20,4), (200,33,64), (50,120,90)])
def test_minibatches_equal_the_full_batch_and_the_formula(n, dx, dy, debiased):
    X,Y = data(n, dx, dy)
    want = naive(X, Y, debiased)
    for size in (1, 3, n//2, n): assert cka(X, Y, debiased, size=size)==pytest.approx(want, abs=1e-6, nan_ok=True)

@pytest.mark.parametrize('seed', range(5))
def test_any_partition_gives_the_same(seed):
    X,Y = data(150, 10, 12, seed)
    cuts = np.sort(np.random.default_rng(seed).choice(range(1, 150), 9, replace=False))
    s = Sums()
    for x,y in zip(np.split(X.numpy(), cuts), np.split(Y.numpy(), cuts)): s.add(torch.tensor(x), torch.tensor(y))
    whole = Sums(); whole.add(X, Y)
    for debiased in (True,False): assert s.hsic(debiased)==pytest.approx(whole.hsic(debiased), rel=1e-10)

def test_large_means_do_not_spoil_it():
    X,Y = data(100, 8, 6)
    far = data(100, 8, 6, offset=1e3)
    assert cka(*far, size=9)==pytest.approx(cka(X, Y), abs=1e-4) # float32 input has lost digits, the sums have not
    assert cka(X.double()+1e6, Y.double()-1e6, size=9)==pytest.approx(cka(X.double(), Y.double()), abs=1e-6)

def test_identities_of_cka():
    X,Y = data(300, 12, 12)
    Q = torch.linalg.qr(torch.randn(12, 12)).Q
    for debiased in (True,False):
        f = lambda X,Y: cka(X, Y, debiased)
        assert f(X, X)==pytest.approx(1) and f(X, Y)==pytest.approx(f(Y, X))
        assert f(X@Q, Y)==pytest.approx(f(X, Y), abs=1e-5) and f(-4*X+2, Y)==pytest.approx(f(X, Y), abs=1e-5)
        assert f(Y, Y*torch.logspace(0, 1.5, 12))<.9, 'a general linear map must be seen'

def test_known_values():
    E = torch.linalg.qr((lambda E: E-E.mean(0))(torch.randn(200, 16).double())).Q
    for p in (1,4,16): assert cka(E, E[:,:p], debiased=False)==pytest.approx((p/16)**.5)
    g = torch.Generator().manual_seed(0)
    null = [(cka(a, b), cka(a, b, False)) for a,b in (torch.randn(2, 50, 100, generator=g) for _ in range(40))]
    assert abs(np.mean(null, 0)[0])<.02 and np.mean(null, 0)[1]>.6

def test_memory_does_not_grow_with_samples():
    def held(batches):
        c = CKA()
        for i in range(batches): c.update(dict(a=torch.randn(20, 6)), dict(b=torch.randn(20, 5)))
        return sum(t.numel() for s in c.pairs.values() for v in vars(s).values() for t in (v if isinstance(v, tuple) else [v]) if isinstance(t, torch.Tensor))
    assert held(2)==held(50)

def test_wrong_input_is_an_error():
    with pytest.raises(ValueError, match='5 samples on one side and 4 on the other'): Sums().add(torch.randn(5, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match='four samples'): cka(torch.randn(3, 2), torch.randn(3, 2))
    assert np.isnan(cka(torch.ones(9, 2), torch.randn(9, 2)))

def test_cca_sees_no_linear_map_and_stands_rank_loss():
    X,Y = data(300, 10, 10)
    def of(f, X, Y):
        s = [Sums() for _ in range(3)]
        for a,(x,y) in zip(s, ((X,X),(X,Y),(Y,Y))): a.add(x, y)
        return f(*s)
    A = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))
    assert of(pwcca, X, X@A)==pytest.approx(1, abs=1e-5)
    twice = torch.cat([X,X], 1)                                   # of rank 10
    assert of(svcca, twice, Y)==pytest.approx(of(svcca, X, Y), abs=1e-6) and of(pwcca, twice, twice)==pytest.approx(1, abs=1e-6)

def test_positions_are_valid_and_even():
    mask = torch.tensor([[1,1,1,1,1,1],[0,0,1,1,0,0],[0]*6]).bool()
    at = sample_positions(mask, 3)
    assert mask[at].all() and at[0].tolist()==[0,0,0,1,1] and at[1].tolist()[:3]==[0,2,5]
    assert record_steps(1)==[0,1] and len(record_steps(90_000, 20))<=21

def test_states_leave_no_trace_when_the_model_fails():
    from transformers import RobertaConfig, RobertaModel
    m = RobertaModel(RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).train()
    hooks,rng = sum(len(x._forward_hooks) for x in m.modules()),torch.get_rng_state()
    with pytest.raises(IndexError): collect_states(m, dict(input_ids=torch.tensor([[10]])), ['encoder.layer.0'])
    assert m.training and sum(len(x._forward_hooks) for x in m.modules())==hooks and torch.get_rng_state().equal(rng)

@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv('CALD_RUNS', str(tmp_path/'runs'))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(root), *filter(None, [os.environ.get('PYTHONPATH')])]))
    return tmp_path

def test_notebooks_write_figures_with_provenance(store):
    pytest.importorskip('espeakng_loader', reason='generated speech needs the extra `demo`')
    figures = sorted((root/'paper_figures').rglob('*'))
    kw = dict(scale='smoke', speech_tasks=['asr'], modes=['target','hybrid'], seeds=[0], out=str(store/'out'))
    for nb in ('08_cka','08a_trajectories'):
        pm.execute_notebook(root/'nbs'/f'{nb}.ipynb', store/f'{nb}.ipynb', progress_bar=False, kernel_name='python3', parameters=kw)
    names = ('cka','cka_stages','cka_result','fig3','fig4','fig4_progress')
    assert {p.name for p in (store/'out').iterdir()}=={f'{n}.{e}' for n in names for e in ('csv','png','pdf','json')}|{f'{n}.{e}' for n in ('shift','fig4_ends','cka_layers') for e in ('csv','md','json')}
    for n in names:
        prov = json.loads((store/'out'/f'{n}.json').read_text())
        assert prov['scale']==['smoke'] and prov['seeds']==[0] and prov['runs']
    maps = pd.read_csv(store/'out'/'cka.csv')
    assert set(maps.kind)=={'text','speech'} and set(maps['mode'])=={'target','hybrid'} and set(maps.when)=={'start','end'}
    assert sorted((root/'paper_figures').rglob('*'))==figures
    records = list((store/'runs').glob('*/states.safetensors'))
    assert len(records)==len(list((store/'runs').glob('*/result.json')))==6 # recorded in training, nothing trained twice
