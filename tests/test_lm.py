"Language models: tests that the notebooks 04l_lm_task and 07_lm cannot hold"
import importlib.util, json
from dataclasses import replace

import numpy as np, pandas as pd, pytest, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig

import cald.lab.experiment
from cald.convert import convert
from cald.paper.table2 import Lm,LmRecipe,zero_shot
from cald.tasks.lm import encode,evaluate_lm,hold_out,lm_config,load_lm,Rows,smoke_gpt_neox,TokenRows
from cald.data.tables import DataError
from cald.lab.grid import cell,settings
from cald.lab.store import Store
from cald.data.tokens import pack,Tokens,write_tokens
from common import train

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

@pytest.fixture(scope='session')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('lm')

@pytest.fixture(scope='session')
def source(cache): return smoke_gpt_neox(cache)

def read(source, cache, tasks=('small',), **kw):
    exp = Lm()
    return exp,exp.read(list(tasks), source, str(cache), scale='smoke', **kw)

def rows(data, split='train'): return np.stack([data.parts[split].row(i) for i in range(len(data.parts[split]))])

# ---- the text

def test_budgets_are_beginnings_of_one_another_and_the_order_follows_from_the_seed(source, cache):
    _,data = read(source, cache, ['small','medium','large'])
    small,medium,large = (rows(data[t]) for t in data)
    assert [len(small),len(medium),len(large)]==[16,32,64]
    assert (large[:16]==small).all() and (large[:32]==medium).all()
    assert len({d.hash for d in data.values()})==1
    again,other = (read(source, cache, seed=s)[1]['small'] for s in (0,1))
    assert (rows(again)==small).all() and again.hash==data['small'].hash
    assert (rows(other)!=small).any() and other.hash!=again.hash
    assert (rows(other, 'test')==rows(again, 'test')).all()           # held-out text is the same

def test_held_out_text_is_of_other_files(source, cache):
    exp,data = read(source, cache, train_rows=-1, dev_rows=10**6, test_rows=10**6)
    have = {s: '\n'.join(exp.tokenizer.decode(r[1:]) for r in rows(data['small'], s)) for s in ('train','dev','test')}
    for s in ('dev','test'):
        seen = [l for l in have[s].split('\n') if len(l)>60]
        assert seen and not any(l in have['train'] for l in seen)

def test_settings_and_data_decide_the_key(source, cache):
    a,b,c = (read(source, cache, **kw)[1]['small'].hash for kw in ({},dict(length=16),dict(test_rows=4)))
    assert len({a,b,c})==3

def test_the_papers_budgets_see_their_text_twice():
    for budget,rows_of_paper in dict(small=732160, medium=1464320, large=2928640).items():
        r = LmRecipe(**settings(cell(budget, scale='paper')))
        assert round(r.train_rows*r.share)==rows_of_paper
        assert r.steps_student*r.batch*r.accumulate/rows_of_paper==2
        assert r.of('standard')[1]==0

def test_every_byte_has_a_token_and_short_text_is_named(source):
    tok = AutoTokenizer.from_pretrained(source)
    text = 'Every byte has a token: naïve, 中文, 🙂.'
    assert tok.decode(tok(text)['input_ids'], clean_up_tokenization_spaces=False)==text
    assert tok.eos_token_id==0 and len(tok)==AutoModelForCausalLM.from_pretrained(source).config.vocab_size
    with pytest.raises(DataError, match=r'note.txt: \d+ tokens do not fill a row of 16\+1'): encode(['short'], tok, 16, where='note.txt')

# ---- token files

@pytest.mark.parametrize('sizes', [[17]*40, [34]*20, [5,40,3,17]*12, [200]*4], ids=['rows','two rows','documents','long'])
def test_rows_of_token_files(tmp_path, sizes):
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, 300, n) for n in sizes]
    write_tokens(docs, tmp_path/'d')
    tokens = Tokens(tmp_path/'d.idx')
    got = np.stack(list(TokenRows(tokens, 16)))
    want = [pack([d], 16)[0] for d in docs] if len(set(sizes))==1 else [pack(docs, 16)[0]]
    assert (got==np.concatenate(want)).all()
    held = hold_out(tokens, 16, 2, 3)
    assert len(held['test'])>=3 and len(held['dev'])>=2
    edges = [(h.start,h.start+len(h.ends)) for h in held.values()] # no sequence is in two parts, none is lost
    assert edges[0][0]==0 and edges[0][1]==edges[1][0] and edges[1][1]==edges[2][0] and edges[2][1]==len(sizes)

def test_a_sequence_of_token_files_is_cut_into_rows(tmp_path):
    write_tokens([np.arange(17)+17*i for i in range(4)], tmp_path/'d')
    rows = TokenRows(Tokens(tmp_path/'d.idx'), 8, 1, 2)
    assert [r.tolist() for r in rows]==[list(range(17, 26)), list(range(25, 34))]

def run_one(exp, data, source, store, mode, **kw):
    grid = exp.grid(list(data), ['standard', mode], [0], source, 'smoke', **kw)
    return exp.train_cells([c for _,c in grid], data, store)

def test_from_megatron_files_to_a_result(source, cache, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path/'pile').mkdir()
    write_tokens([rng.integers(0, 400, 33) for _ in range(120)], tmp_path/'pile/document')
    exp,data = read(source, cache, path=str(tmp_path/'pile'))
    assert data['small'].about|{'bytes_of_test':0}==dict(data='document.idx', rows=16, tokens=512, epochs=1., dev=8, test=16, bytes_of_test=0)
    res = run_one(exp, data, source, Store(tmp_path/'runs', exp.modules), 'target')
    assert len(res)==2 and (res.perplexity>1).all() and (res.bits>0).all()

def test_tokens_of_another_model_and_other_faults_stop_before_training(source, cache, tmp_path):
    write_tokens([[5,400,7]*11]*60, tmp_path/'foreign')
    with pytest.raises(DataError, match='foreign.idx, train: row 0 has the token 400, but .* knows 400 only'): read(source, cache, path=str(tmp_path/'foreign.idx'))
    write_tokens([[5,39,7]*11]*10, tmp_path/'few')
    with pytest.raises(DataError, match='10 sequences are too few to hold out 16 rows'): read(source, cache, path=str(tmp_path/'few.idx'))
    (tmp_path/'t.jsonl').write_text('\n'.join(json.dumps(dict(text=f'row {i}')) for i in range(40)))
    with pytest.raises(DataError, match=r't.jsonl, dev: \d+ tokens do not fill a row of 32\+1'): read(source, cache, path=str(tmp_path/'t.jsonl'))
    with pytest.raises(DataError, match="leave none for the budget 'small'"): read(source, cache, train_rows=1)
    with pytest.raises(ValueError, match='pretrained on at most 64: give a smaller length'): read(source, cache, length=65)
    with pytest.raises(ValueError, match='did you mean'): read(source, cache, lenght=16)
    BertConfig().save_pretrained(tmp_path/'bert')
    with pytest.raises(ValueError, match='a bert checkpoint; Table 2 needs gpt_neox'): read(str(tmp_path/'bert'), cache)

def test_a_source_with_missing_weights_is_refused(source, tmp_path):
    from safetensors.torch import load_file, save_file
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path)
    w = load_file(tmp_path/'model.safetensors')
    del w[next(k for k in w if 'dense_h_to_4h.weight' in k)]
    save_file(w, tmp_path/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='1 weights are missing'): load_lm(str(tmp_path))

# ---- training

def weights(exp, run): return exp.load(run.folder/'model').state_dict()

@pytest.mark.parametrize('mode', ['target','hybrid'])
def test_interrupted_is_uninterrupted(source, cache, tmp_path, mode, monkeypatch):
    exp,data = read(source, cache)
    kw = dict(steps_student=4, evals=4, until=.6)
    c = next(c for r,c in exp.grid(['small'], [mode], [0], source, 'smoke', **kw) if r==mode)
    def key(store): return store.run(c, data['small'].hash)
    whole,cut = (Store(tmp_path/n, exp.modules) for n in ('whole','cut'))
    run_one(exp, data, source, whole, mode, **kw)
    was,n = cald.lab.experiment.TableDistiller.evaluate,[]
    def stop(self, *a, **k):
        n.append(1)
        if len(n)==3: raise RuntimeError('the power went')
        return was(self, *a, **k)
    monkeypatch.setattr(cald.lab.experiment.TableDistiller, 'evaluate', stop)
    with pytest.raises(RuntimeError, match='the power went'): run_one(exp, data, source, cut, mode, **kw)
    assert not key(cut).done
    run_one(exp, data, source, cut, mode, **kw)
    a,b = weights(exp, key(whole)),weights(exp, key(cut))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_the_standard_model_is_the_source_and_random_weights_are_not(source, cache):
    exp,data = read(source, cache)
    c = dict(source=source, mixer='mamba', mode='unguided', scale='smoke', init='source')
    made = {k: exp.source(cell('small', **c, **kw), LmRecipe(**settings(cell('small', **c, **kw))), None) for k,kw in
            dict(plain={}, random=dict(random_student=True)).items()}
    src = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(v, src[k]) for k,v in made['plain'].state_dict().items())
    assert not any(torch.equal(v, src[k]) for k,v in made['random'].state_dict().items() if v.ndim>1)

def test_a_teacher_that_is_fine_tuned_first_is_where_its_students_start(source, cache, tmp_path):
    (exp,data),store = read(source, cache),Store(tmp_path, Lm.modules)
    def cells(**kw): return dict(exp.grid(['small'], ['standard','unguided'], [0], source, 'smoke', steps_student=2, evals=2, **kw))
    plain,tuned = ({r: train(exp, store, c, data['small']) for r,c in cells(steps=n).items()} for n in (0,3))
    assert plain['standard'].result['perplexity']!=tuned['standard'].result['perplexity']
    assert tuned['standard'].result['best_step']>0 and 'best_step' not in plain['standard'].result
    start = exp.ready(cells(steps=3)['unguided'], exp.recipe(**tuned['unguided'].settings), None, tuned['standard'].folder)[0].state_dict()
    teacher = weights(exp, tuned['standard'])
    same = [k for k in start if k in teacher]
    assert len(same)>=10 and all(torch.equal(start[k], teacher[k]) for k in same)
    few,all_ = (exp.standard_cell(cells(steps=3, train_rows=n)['unguided']) for n in (32,64))
    assert few!=all_, 'what it was trained on is part of its name'

def test_the_papers_sizes(source):
    r = LmRecipe(**settings(cell('large', scale='paper')))
    assert Lm().mixer_args('mamba', r)==dict(d_state=16, d_inner=5120, dt_rank=160)
    m = convert(load_lm(source), to='mamba', **Lm().mixer_args('mamba', replace(r, d_inner=80, dt_rank=5)))
    mixer = next(iter(m.replacements.values())).mixer
    assert mixer.in_proj.weight.shape==(160,32) and mixer.dt_proj.weight.shape==(80,5)

def test_judging_does_not_depend_on_the_batch_and_leaves_the_model_as_it_was(source, cache):
    exp,data = read(source, cache)
    ds,m = data['small'].parts['test'],load_lm(source).train()
    a,b = (evaluate_lm(m, Rows(ds.rows, len(ds), n, exp.tokenizer)) for n in (3,16))
    assert a==pytest.approx(b, rel=1e-5) and m.training
    half = evaluate_lm(m.bfloat16(), ds)
    assert half['perplexity']==pytest.approx(a['perplexity'], rel=.02)

# ---- the harness

def test_the_source_is_measured_once_for_all_budgets_and_seeds(source, cache, tmp_path, monkeypatch):
    exp,data = read(source, cache, ['small','medium'])
    store = Store(tmp_path, exp.modules)
    measured = []
    monkeypatch.setattr(exp, 'judge', lambda model, ds: measured.append(ds) or evaluate_lm(model, ds))
    def table(**kw): return exp.train_cells([c for _,c in exp.grid(list(data), ['standard'], [0,1], source, 'smoke', **kw)], data, store)
    found = table()
    assert len(measured)==1 and len(found)==4 and found.perplexity.nunique()==found.bits.nunique()==1
    alone = evaluate_lm(load_lm(source), data['small'].parts['test'])
    assert found.perplexity[0]==alone['perplexity']
    models = [exp.load(store.behind(r).folder/'model').state_dict() for r in found.record]
    assert all(torch.equal(models[0][n], m[n]) for m in models for n in m)
    table(random=True)
    assert len(measured)==5 # weights that each seed draws
    table(judge_batch=2)
    assert len(measured)==6
    monkeypatch.setattr('cald.lab.store.Run.changed', lambda run: ['cald.mixers']) # what other code measured is no source of numbers
    exp.train_cells([c for _,c in exp.grid(list(data), ['standard'], [2], source, 'smoke')], data, store)
    assert len(measured)==8

def test_zero_shot_results_are_measured_once_and_kept(source, cache, tmp_path, monkeypatch):
    exp,data = read(source, cache, ['small','medium'])
    store = Store(tmp_path, exp.modules)
    found = exp.train_cells([c for _,c in exp.grid(list(data), ['standard','unguided'], [0], source, 'smoke')], data, store)
    calls = []
    def zero_shot(model, tokenizer, tasks, task_folder, batch_size):
        calls.append((type(model).__name__, batch_size))
        return pd.DataFrame(dict(task=tasks, metric='acc', value=.5, stderr=None, n=3))
    monkeypatch.setattr('cald.paper.table2.zero_shot', zero_shot)
    for _ in range(2):
        scores = [exp.stored_zero_shot(store.behind(r), store, ['piqa','sciq']) for r in found.record]
        assert all(s.task.tolist()==['piqa','sciq'] and (s.value==.5).all() for s in scores)
    batch = settings(cell('small', scale='smoke'))['judge_batch']
    assert [b for _,b in calls]==[batch]*3 # the source once, two students
    exp.stored_zero_shot(store.behind(found.record[0]), store, ['piqa'])
    assert len(calls)==4

def test_zero_shot_is_what_the_model_says(source, tmp_path):
    if importlib.util.find_spec('lm_eval') is None: pytest.skip('lm-eval is not installed (extra `eval`)')
    m,tok,n = convert(load_lm(source), to='mamba', seed=0),AutoTokenizer.from_pretrained(source),24
    ends,right = ['the','of'],[int(i%3==0) for i in range(n)]
    (tmp_path/'d.jsonl').write_text('\n'.join(json.dumps(dict(start=f'Row {i} is', ends=ends, right=r)) for i,r in enumerate(right)))
    (tmp_path/'mini.yaml').write_text(f'''task: mini
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path/'d.jsonl'}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
''')
    def likely(start, end):
        a,b = tok(start)['input_ids'],tok(f'{start} {end}')['input_ids'] # the harness puts the space between
        p = m(torch.tensor([b])).logits.log_softmax(-1)[0]
        return sum(p[t-1,b[t]].item() for t in range(len(a), len(b)))
    want = np.mean([(likely(f'Row {i} is', ends[1])>likely(f'Row {i} is', ends[0]))==r for i,r in enumerate(right)])
    got = zero_shot(m, tok, ['mini'], tmp_path)
    assert got.value[0]==pytest.approx(want) and got.n[0]==n and got.stderr[0]>0

def test_mamba_is_as_wide_as_the_papers_for_a_source_of_any_width(source):
    width = lm_config(source).hidden_size
    def sizes(scale, **over):
        _,c = Lm().grid(['small'], ['target'], [0], source, scale, **over)[-1]
        return settings(c)['d_inner'],settings(c)['dt_rank']
    assert sizes('paper')==(width*5//2, width*5//64)
    assert sizes('paper', d_inner=96)==(96, width*5//64)
    assert sizes('smoke')==(0,0)
