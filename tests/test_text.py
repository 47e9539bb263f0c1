"Text data: tests that the notebooks 04 to 04e cannot hold"
import gzip, importlib.metadata, json, os, re, subprocess, sys, warnings
from pathlib import Path

import numpy as np, pandas as pd, pytest
from packaging.requirements import Requirement

import cald.data.docs as text, cald.data.text as text_data
from cald.data.prose import doc_parts
from cald.data.tables import DataError
from cald.files import cache_folder
from cald.data.standins import read_stand_in,stand_in,stems,STAND_INS,STANDIN_SIZES
from cald.data.docs import CORPUS,differing,DOC_PACKAGES,documents,read_docs,SMALL
from cald.data.text import HUB,read_text_task
from cald.data.tokens import pack,read_index,read_lm,Tokens,write_tokens
from common import data_folder

pytestmark = pytest.mark.xdist_group('text') # one process builds the corpus

TREE = Path(__file__).parent.parent
ENV = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(TREE), os.environ.get('PYTHONPATH', '')])}

def sizes(df): return df.split.value_counts().to_dict()

@pytest.fixture(scope='session')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('text')

@pytest.fixture(scope='session')
def docs():
    "The whole corpus, which takes half a minute if no notebook has built it yet"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return read_docs(cache_folder())

# ---- the corpus

def test_the_corpus_of_the_pinned_versions_has_the_hash_in_the_code(docs):
    if differing(): pytest.skip(f'other versions: {", ".join(differing())}')
    assert docs.attrs['hash']==CORPUS, 'raise BUILD and set CORPUS when the corpus is meant to change'

def test_other_versions_give_one_warning_that_names_them(docs, monkeypatch):
    monkeypatch.setattr(text, 'CORPUS', '0'*64)
    monkeypatch.setitem(DOC_PACKAGES, 'scipy', '0.1')
    with pytest.warns(UserWarning, match=r'Differences: .*scipy [\d.]+ \(pinned: 0.1\)') as said: read_docs(cache_folder())
    assert len(said)==1

def test_packages_are_pinned_and_in_every_installation():
    pins = dict(re.match(r'([\w.-]+)==([^;\s]+)', l).groups() for l in (TREE/'constraints.txt').read_text().splitlines() if re.match(r'[\w.-]+==', l))
    plain = lambda n: re.sub('[-_.]+', '-', n).lower()
    pins = {plain(k): v for k,v in pins.items()}
    assert {p: pins.get(plain(p)) for p in DOC_PACKAGES}==DOC_PACKAGES
    ini = (TREE/'settings.ini').read_text()
    core = re.search(r'^requirements = (.*?)\n\w', ini, re.M|re.S)[1]+' '+re.search(r'^demo_requirements = (.*)', ini, re.M)[1]
    todo,found = [Requirement(r).name for r in core.split()],set()
    while todo:
        name = plain(todo.pop())
        if name in found: continue
        found.add(name)
        try: needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError: continue
        todo += [r.name for r in map(Requirement, needs) if r.marker is None or r.marker.evaluate({'extra':''})]
    assert not {plain(p) for p in DOC_PACKAGES}-found, 'only what the core and the extra `demo` install may be read'

def test_the_corpus_does_not_depend_on_the_process_and_imports_nothing(tmp_path):
    code = '''import sys, cald.data.docs as t
before = set(sys.modules)
print(t.read_docs(sys.argv[1], ['networkx','jiwer']).attrs['hash'], sorted(m for m in set(sys.modules)-before if m.split('.')[0] in ('networkx','jiwer')))'''
    procs = [subprocess.Popen([sys.executable,'-c',code,str(tmp_path/'b')], env={**ENV, 'PYTHONHASHSEED':seed}, stdout=subprocess.PIPE, text=True) for seed in '12'] # both write the same file
    said = {p.communicate()[0].strip() for p in procs}
    assert said=={f"{read_docs(tmp_path/'a', ['networkx','jiwer']).attrs['hash']} []"}
    assert len(list((tmp_path/'b').iterdir()))==1

def test_the_corpus_is_prose_without_repeats_and_divided_by_file(docs):
    assert docs.text.str.lower().is_unique
    assert docs.groupby('file').split.nunique().max()==1
    assert docs.text.map(str.isascii).all() and not docs.text.str.contains('>>>|```', regex=True).any()
    assert docs.text.str.contains(r':[a-z]+:|https?://|`|\]\(', regex=True).mean()<1e-3
    pages = documents(docs)
    words = pages.text.str.split().str.len().groupby(pages.split).sum()
    assert words.sum()>1_500_000 and words['dev']>100_000 and words['test']>200_000

@pytest.mark.parametrize('doc', ['', ' ', 'x', '::', '```', '```\ncode', '.. note::', '====\n----', 'Args:', 'Args:\n    x', ':param:', 'Returns\n-------', '>>> 1', '-', '[]()', '$$', '\x0c a\tb'])
def test_odd_documentation_strings_do_no_harm(doc): assert doc_parts(doc)==[]

# ---- stand-ins

@pytest.mark.parametrize('task', STAND_INS)
def test_stand_ins_are_balanced_and_disjoint(docs, task):
    df = stand_in(task, docs)
    n = sizes(df)
    assert 6000<=n['train']<=STANDIN_SIZES['train'] and n['dev']>=400 and n['test']>=900
    assert (df.groupby(['split','label']).size().unstack().pipe(lambda c: c.max(axis=1)-c.min(axis=1))==0).all()
    assert not df.duplicated(['text','text_b']).any()
    for c in ('text','text_b'):
        found = {s: set(g[c].dropna().str.lower()) for s,g in df.groupby('split')}
        assert not found['train']&found['test'] and not found['dev']&found['test'] and not found['train']&found['dev']

@pytest.mark.parametrize('task', ('qnli','qqp'))
def test_shared_words_do_not_reveal_the_class_of_a_pair(docs, task):
    df = stand_in(task, docs)
    shared = [len(stems(a)&stems(b)) for a,b in zip(df.text, df.text_b)]
    union = [max(1, len(stems(a)|stems(b))) for a,b in zip(df.text, df.text_b)]
    positive = df.label.isin(['entailment','duplicate']).to_numpy()
    for overlap in (np.array(shared), np.array(shared)/union):
        accuracy = max(((overlap>=t)==positive).mean() for t in np.unique(overlap))
        assert accuracy<.65, f'{accuracy:.1%} by overlap alone'

@pytest.mark.parametrize('task', STAND_INS)
def test_a_stand_in_depends_on_its_seed_alone(docs, task):
    some = docs[docs.package.isin(['scipy','networkx'])]
    df = stand_in(task, some)
    assert len(df)>100 and df.equals(stand_in(task, some)) and not df.equals(stand_in(task, some, seed=1))

def test_a_small_stand_in_is_made_at_each_scale(cache):
    df = read_text_task('', 'qnli', cache, 'smoke')
    assert list(df.columns)==['text','text_b','label','split'] and df.attrs['data']=='qnli stand-in' and len(df.attrs['hash'])==64
    assert df.attrs==read_text_task('', 'qnli', cache, 'smoke').attrs!=read_text_task('', 'qnli', cache, 'smoke', seed=1).attrs
    assert read_stand_in('sst2', cache, 'smoke').text_b.isna().all()

# ---- the hub

class Served:
    "What `datasets.load_dataset` gives, as far as it is used"
    def __init__(self, rows, names=None): self.rows,self.features = rows,dict(label=type('Label', (), dict(names=names))())
    def __iter__(self): return iter(self.rows)
    def unique(self, c): return list({r[c] for r in self.rows})

def test_the_hub_is_asked_for_the_papers_data(cache, monkeypatch, capsys):
    import datasets
    asked = []
    def load(name, config):
        asked.append((name,config))
        row = lambda s,i,y: dict(text=f'{s} {i//2 if s=="train" else i}', label=y) if 'imdb' in name else dict(
            **{dict(sst2='sentence').get(config, 'question' if config=='qnli' else 'question1'): f'{s} {i}'},
            **({} if config=='sst2' else {'sentence' if config=='qnli' else 'question2': f'other {s} {i}'}), label=y, idx=i)
        splits = dict(train=[0,1]*20, test=[0,1]*5, unsupervised=[-1]*4) if 'imdb' in name else dict(train=[0,1]*20, validation=[0,1]*5, test=[-1]*4)
        return {s: Served([row(s, i, y) for i,y in enumerate(ys)], ['no','yes']) for s,ys in splits.items()}
    monkeypatch.setattr(datasets, 'load_dataset', load)
    for task in HUB:
        df = read_text_task('', task, cache, 'paper')
        assert set(df.label)=={'no','yes'} and sizes(df)['test']==10 and sizes(df)['train']+sizes(df)['dev']==40
        assert df.text_b.isna().all()==(task in ('sst2','imdb')) and df.attrs['data']==('stanfordnlp/imdb' if task=='imdb' else f'nyu-mll/glue/{task}')
    assert asked==[('nyu-mll/glue','qnli'),('nyu-mll/glue','qqp'),('nyu-mll/glue','sst2'),('stanfordnlp/imdb',None)]

def test_texts_in_two_splits_of_the_hub_are_kept_and_told(cache, monkeypatch, capsys):
    import datasets
    rows = [dict(text=f't{i}', label=i%2) for i in range(40)]
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a: dict(train=Served(rows, ['neg','pos']), test=Served(rows[:1]+[dict(text='new', label=1)], ['neg','pos'])))
    assert sum(sizes(read_text_task('hub', 'imdb', cache)).values())==42
    assert 'stanfordnlp/imdb: 1 rows of train or dev are in test, too; they are kept, as published' in capsys.readouterr().out

def test_no_network_says_what_to_do(cache, monkeypatch):
    import datasets
    def fail(*a): raise ConnectionError('no route to the hub')
    monkeypatch.setattr(datasets, 'load_dataset', fail)
    with pytest.raises(DataError, match="nyu-mll/glue could not be loaded .*no route.* give its folder as `data`"): read_text_task('', 'qqp', cache, 'paper')

# ---- real data

@pytest.mark.parametrize('files,train,test', [('glue',60614,872), ('sentences',6920,1821)])
def test_sst2_is_read_as_it_lies(cache, capsys, files, train, test):
    folder = data_folder('sst2')
    if files=='sentences':
        message = r'sentences_train.tsv, row \d+: in train, but also in test \(.*sentences_test.tsv, row \d+\)'
        with pytest.raises(DataError, match=message): read_text_task(folder, 'sst2', cache, files=files)
    df = read_text_task(folder, 'sst2', cache, files=files, drop=files=='sentences')
    left = int((re.search(r'(\d+) of \d+ rows cannot be used', capsys.readouterr().out) or [0,0])[1])
    n = sizes(df)
    assert left==(0 if files=='glue' else 3) and n['test']==test and n['train']+n['dev']+left==train+(6735 if files=='glue' else 872) and set(df.label)=={'0','1'}
    if files=='glue':
        assert read_text_task(folder, 'sst2', cache).attrs==df.attrs
        assert 'several sets of files' in capsys.readouterr().out
    small = read_text_task(folder, 'sst2', cache, files=files, drop=True, max_train=1000, max_eval=100)
    assert sizes(small)==dict(train=1000, dev=100, test=100)
    share = lambda d: (d.label[d.split=='train']=='1').mean()
    assert abs(share(small)-share(df))<.002

def test_imdb_is_read_as_it_lies(cache):
    folder = data_folder('imdb')
    with pytest.raises(DataError, match=r'train.jsonl.gz, row \d+: in (train|dev), but also in test'): read_text_task(folder, 'imdb', cache)
    df = read_text_task(folder, 'imdb', cache, drop=True)
    n = sizes(df)
    assert n['test']==2500 and 249<=n['dev']<=252 and n['train']+n['dev']==2499
    assert not set(df.text[df.split!='test'])&set(df.text[df.split=='test']) and not set(df.text[df.split=='dev'])&set(df.text[df.split=='train'])
    assert abs((df.label[df.split=='dev']=='1').mean()-.5)<.02

def test_too_few_training_rows_for_the_classes_are_told(tmp_path, cache):
    (tmp_path/'own.tsv').write_text('sentence\tlabel\n'+''.join(f'sentence {i}\t{i%3}\n' for i in range(90)))
    assert set(read_text_task(tmp_path/'own.tsv', 'sst2', cache).label)=={'0','1','2'}
    with pytest.raises(ValueError, match='max_train=2 leaves no training example of [012]: increase max_train'): read_text_task(tmp_path/'own.tsv', 'sst2', cache, max_train=2)

def test_documents_may_name_their_split(tmp_path, cache):
    def write(name, splits): (tmp_path/name).write_text(''.join(json.dumps(dict(text=f'document {i}, of {s}', split=s))+'\n' for i,s in enumerate(splits)))
    write('own.jsonl', 40*['train']+30*['validation','Test'])
    df = read_lm(tmp_path/'own.jsonl', cache)
    assert sizes(df)==dict(train=40, dev=30, test=30) and df.text[df.split=='test'].str.endswith('Test').all()
    write('odd.jsonl', 40*['train']+['tset'])
    with pytest.raises(DataError, match="odd.jsonl, row 41: unknown split 'tset'"): read_lm(tmp_path/'odd.jsonl', cache)
    write('some.jsonl', 40*['train']+[None])
    with pytest.raises(DataError, match='which split does it belong to'): read_lm(tmp_path/'some.jsonl', cache)

@pytest.mark.parametrize('files,path,message', [
    ({'tests/test.txt':'a', 'tests/valid.txt':'b'}, 'tests', 'no rows of the split train; it has dev, test'),
    ({'line.txt':'short'}, 'line.txt', 'line.txt: too little text to cut it into train, dev and test'),
    ({'own.csv':'text\na\n'}, 'own.csv', 'text is read from .txt and .jsonl'),
    ({'several/a.csv':'text\na\n'}, 'several', 'no .txt or .jsonl files there'),
    ({'empty.jsonl':'{"text": " "}\n'}, 'empty.jsonl', 'row 1: `text` is empty')])
def test_unusable_text_for_a_language_model_is_named(tmp_path, cache, files, path, message):
    for name,text in files.items(): write(tmp_path/name, text)
    with pytest.raises(DataError, match=message): read_lm(tmp_path/path, cache)

def test_scale_paper_needs_text_of_its_own(cache):
    with pytest.raises(ValueError, match='scale paper needs data'): read_lm('', cache, 'paper')

# ---- token files

MINI = [[1,2,3],[4,5],[6,7,8,9],[10]]

@pytest.fixture
def mini(tmp_path):
    "The bytes of the index and of the tokens of `MINI`"
    write_tokens(MINI, tmp_path/'document')
    return [(tmp_path/f'document.{kind}').read_bytes() for kind in ('idx','bin')]

@pytest.mark.parametrize('change,message', [
    (lambda index: index[:-3], 'truncated, 119 bytes where 4 sequences take 122'),
    (lambda index: index[:20], 'truncated, 20 bytes'),
    (lambda index: b'text'*20, 'not the index of Megatron token files'),
    (lambda index: index+b'0', 'too long'),
    (lambda index: index[:9]+b'\2'+index[10:], 'version 2 of the format'),
    (lambda index: index[:17]+b'\7'+index[18:], 'unknown type of tokens')])
def test_a_damaged_index_is_named(tmp_path, mini, change, message):
    (tmp_path/'bad.idx').write_bytes(change(mini[0]))
    with pytest.raises(DataError, match=f'bad.idx: {message}'): read_index(tmp_path/'bad.idx')

def write_parts(folder, mini, cuts, without=()):
    "The tokens of `mini` in parts, cut at the bytes `cuts`, except the parts `without`"
    index,tokens = mini
    folder.mkdir()
    (folder/'document.idx').write_bytes(index)
    for i,(start,end) in enumerate(zip([0,*cuts], [*cuts,None])):
        part = folder/f'document-{i:05d}-of-{len(cuts):05d}.bin'
        if i not in without: part.write_bytes(tokens[start:end])
    return folder

@pytest.mark.parametrize('cuts', [[9,18], [8,16], [6,12,18]])
def test_parts_of_token_files_are_read_as_one(tmp_path, mini, cuts):
    tokens = Tokens(write_parts(tmp_path/'parts', mini, cuts))
    assert [t.tolist() for t in tokens]==MINI
    with pytest.raises(IndexError, match='sequence 4 of 4'): tokens[4]

def test_missing_and_truncated_parts_are_named(tmp_path, mini):
    first = Tokens(write_parts(tmp_path/'first', mini, [9,18], without=(1,2)))
    assert [t.tolist() for t in first]==MINI[:1] and first.total==4
    gap = write_parts(tmp_path/'gap', mini, [8,16], without=(1,))
    with pytest.raises(DataError, match='part 1 is missing before it'): Tokens(gap)
    short = write_parts(tmp_path/'short', mini, [6,10])
    with pytest.raises(DataError, match='document-00001-of-00002.bin: truncated'): Tokens(short)
    cut = write_parts(tmp_path/'cut', mini, [8,16])
    (cut/'document-00002-of-00002.bin').write_bytes(mini[1][16:-2])
    with pytest.raises(DataError, match='truncated, 18 bytes of tokens where document.idx says 20'): Tokens(cut)
    none = write_parts(tmp_path/'none', mini, [4,8], without=(1,2))
    with pytest.raises(DataError, match='not one whole sequence'): Tokens(none)

def test_files_that_do_not_belong_together_are_named(tmp_path, mini, cache):
    write_tokens([[1,2]], tmp_path/'other')
    (tmp_path/'other.bin').write_bytes(mini[1])
    with pytest.raises(DataError, match='they do not belong together'): Tokens(tmp_path/'other.idx')
    (tmp_path/'alone').mkdir()
    (tmp_path/'alone/own.bin').write_bytes(b'1234')
    with pytest.raises(DataError, match='own.idx: no such file'): Tokens(tmp_path/'alone/own.bin')
    with pytest.raises(DataError, match='0 .idx files where one is needed'): read_lm(tmp_path/'alone', cache)

def test_tokens_must_fit_their_type_and_fill_a_row(tmp_path):
    with pytest.raises(ValueError, match='sequence 0: tokens do not fit into uint16'): write_tokens([[70000]], tmp_path/'big')
    with pytest.raises(ValueError, match=r'2 tokens are less than a row of 4\+1'): pack([[1,2]], 4)

def test_real_text_for_language_models(cache):
    df = read_lm(data_folder('tinyshakespeare')/'input.txt', cache)
    n = df.text.str.len().groupby(df.split).sum()
    assert abs(n['dev']/n.sum()-.05)<.002 and abs(n['test']/n.sum()-.05)<.002 and n.sum()>1_115_000
    with pytest.raises(DataError, match='no rows of the split train; it has dev, test'): read_lm(data_folder('wikitext2'), cache)
    assert sizes(read_lm(data_folder('wikitext2')/'test.txt', cache))==dict(train=1, dev=1, test=1)

def test_real_tokens_survive_writing_reading_and_packing(cache, tmp_path):
    from tokenizers import Tokenizer
    tok = Tokenizer.from_file(str(data_folder('tokenizers')/'gpt_neox'/'20B_tokenizer.json'))
    paragraphs = [p for p in (data_folder('tinyshakespeare')/'input.txt').read_text()[:50000].split('\n\n') if p]
    ids = [e.ids for e in tok.encode_batch(paragraphs)]
    write_tokens(ids, tmp_path/'document')
    ts = Tokens(tmp_path)
    assert [tok.decode(t) for t in ts]==paragraphs
    rows,left = pack(ts, 64, eos=0)
    assert rows.shape[1]==65 and rows.shape[0]*64+1+left==sum(len(i)+1 for i in ids)
    assert (rows[1:,0]==rows[:-1,-1]).all()

# ---- files of one's own

def write(path, s, gz=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(s.encode()) if gz else s.encode())
    return path

ROWS = [(f'A {"good" if i%2 else "bad"} film, "number {i}".', str(i%2)) for i in range(40)]

@pytest.mark.parametrize('gz', [False, True])
@pytest.mark.parametrize('kind', ['tsv', 'csv', 'jsonl', 'bom', 'crlf'])
def test_every_kind_of_file_says_the_same(tmp_path, cache, kind, gz):
    quoted = [(t.replace('"', '""'), y) for t,y in ROWS]
    body = dict(tsv='text\tlabel\n'+''.join(f'{t}\t{y}\n' for t,y in ROWS), csv='text,label\n'+''.join(f'"{t}",{y}\n' for t,y in quoted),
                jsonl=''.join(json.dumps(dict(text=t, label=int(y)))+'\n' for t,y in ROWS))
    body.update(bom='\ufeff'+body['tsv'], crlf=body['tsv'].replace('\n', '\r\n'))
    name = f"x.{kind if kind in ('tsv','csv','jsonl') else 'tsv'}{'.gz' if gz else ''}"
    df = read_text_task(write(tmp_path/name, body[kind], gz), 'sst2', cache)
    assert sorted(zip(df.text, df.label))==sorted(ROWS) and sizes(df)==dict(train=32, dev=4, test=4)
    assert df.attrs['hash']==read_text_task(write(tmp_path/'same.tsv', body['tsv']), 'sst2', cache).attrs['hash']

@pytest.mark.parametrize('a,b', text_data.PAIR_COLUMNS)
def test_every_pair_of_columns_is_known(tmp_path, cache, a, b):
    f = write(tmp_path/'x.tsv', f'{a}\t{b}\tlabel\n'+''.join(f'one {i}\ttwo {i}\t{i%2}\n' for i in range(40)))
    df = read_text_task(f, 'qqp', cache)
    assert df.text.str.startswith('one').all() and df.text_b.str.startswith('two').all()

@pytest.mark.parametrize('name,body,message', [
    ('x.tsv', 'text\tlabel\n', r'x.tsv has no rows'), ('x.tsv', '', 'x.tsv is empty'), ('x.txt', 'a', 'not a .tsv, .csv or .jsonl file'),
    ('x.tsv', 'txt\tlabel\na\t1\n', "did you mean 'text' by 'txt'"), ('x.tsv', 'text\tlabell\na\t1\n', 'no column label'),
    ('x.tsv', 'text\tlabel\na\t1\t2\nb\t0\n', r'x.tsv, row 2: 3 fields, but the header has 2'), ('x.tsv', 'text\tlabel\na\t1\n \t0\n', r'x.tsv, row 3: `text` is empty'),
    ('x.jsonl', '{"text": ["a"], "label": 1}\n{"text": "b", "label": 0}', r'x.jsonl, row 1: `text` is not a string'),
    ('x.jsonl', '{"text": "a", "label": 1}\n{"text": "b"}', r'x.jsonl, row 2: no `label`'),
    ('x.tsv', 'text\tlabel\tsplit\na\t1\ttrain\nb\t0\ttrain\nc\t3\ttest\n', "row 4: unknown label '3'"),
    ('x.tsv', 'text\tlabel\tsplit\na\t1\ttest\nb\t0\ttest\n', 'no rows of the split train'),
    ('x.tsv', 'text\tlabel\n'+''.join(f'{i}\tsame\n' for i in range(30)), "all rows of train have the label 'same'")])
def test_bad_files_are_named(tmp_path, cache, name, body, message):
    with pytest.raises(DataError, match=message): read_text_task(write(tmp_path/name, body), 'sst2', cache)

def test_selection_never_sees_the_test_split(tmp_path, cache):
    for given in (('train','dev'), ('train','test'), ('train','dev','test')):
        folder = tmp_path/'-'.join(given)
        for s in given: write(folder/f'{s}.tsv', 'text\tlabel\n'+''.join(f'{s} {i}\t{i%2}\n' for i in range(200 if s=='train' else 30)))
        df = read_text_task(folder, 'sst2', cache)
        assert set(df.text[df.split=='test'])=={f'{given[-1]} {i}' for i in range(30)}
        assert not set(df.text[df.split=='dev'])&set(df.text[df.split=='test']) and (df.split=='dev').sum()==(30 if len(given)==3 else 20)
        if len(given)==2: assert df.attrs!=read_text_task(folder, 'sst2', cache, seed=1).attrs and (df.label[df.split=='dev']=='1').sum()==10

# ---- token files

@pytest.mark.parametrize('dtype', [np.uint16, np.int32, np.int64, np.uint8])
@pytest.mark.parametrize('seed', range(4))
def test_token_parts_may_be_cut_anywhere(tmp_path, dtype, seed):
    rng = np.random.default_rng(seed)
    docs = [rng.integers(0, 200, n) for n in rng.integers(1, 30, 25)]
    write_tokens(docs, tmp_path/'document', dtype)
    raw = (tmp_path/'document.bin').read_bytes(); (tmp_path/'document.bin').unlink()
    size = int(rng.integers(7, len(raw)//3))
    parts = [raw[i:i+size] for i in range(0, len(raw), size)]
    names = [tmp_path/f'document-{k:05d}-of-{len(parts)-1:05d}.bin' for k in range(len(parts))]
    for f,p in zip(names, parts): f.write_bytes(p)
    ts = Tokens(tmp_path)
    assert len(ts)==25 and all(np.array_equal(a, b) and a.dtype==dtype for a,b in zip(ts, docs))
    names[-1].unlink()
    if len(parts)>2: names[-2].unlink()
    ends = np.cumsum([len(d)*np.dtype(dtype).itemsize for d in docs])
    whole = int((ends<=size*max(len(parts)-2, 1)).sum())
    if not whole: return
    ts = Tokens(names[0])
    assert len(ts)==whole and ts.total==25 and all(np.array_equal(a, b) for a,b in zip(ts, docs))

def test_packing_loses_nothing_but_the_tail():
    rng = np.random.default_rng(0)
    for _ in range(20):
        docs = [list(rng.integers(1, 9, n)) for n in rng.integers(0, 9, 12)]
        flat,length = [t for d in docs for t in (*d, 0)],int(rng.integers(1, 9))
        rows,left = pack(docs, length, eos=0)
        assert [int(rows[0,0]), *rows[:,1:].ravel().tolist()]==[int(t) for t in flat[:len(flat)-left]] and left<length
