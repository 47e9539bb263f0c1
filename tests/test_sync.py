"Notebooks, library and stored outputs must agree. These tests read the tree and never write to it."
import csv, json, os, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest
from nbdev.clean import clean_nb
from nbdev.config import get_config
from common import cells,source

root = Path(__file__).parents[1]
nbs = sorted((root/'nbs').glob('*.ipynb'))
ids = dict(ids=lambda p: p.name)

def module_of(f): return re.findall(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(map(source, cells(f, 'code'))), re.M)

def export(nb_folder, to):
    "Export all notebooks into a copy of the project at `to`; the modules as {path: text}"
    shutil.copytree(nb_folder, to/'nbs')
    for f in ('settings.ini','pyproject.toml','README.md'): shutil.copy(root/f, to)
    (to/'cald').mkdir()
    for f in ('__init__.py','__main__.py'): shutil.copy(root/'cald'/f, to/'cald') # written by hand
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'}
    subprocess.run([sys.executable,'-c','from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=to, env=env, check=True)
    return modules(to)

def modules(d): return {p.relative_to(d/'cald').as_posix():p.read_text(encoding='utf-8') for p in sorted((d/'cald').rglob('*.py'))}

def drift(fresh, have):
    "What differs between the modules that the notebooks export and those in the tree"
    lost = [f'{k} is not exported by any notebook' for k in have.keys()-fresh.keys()]
    new = [f'{k} is missing' for k in fresh.keys()-have.keys()]
    return sorted(lost+new+[f'{k} differs from its notebook' for k in fresh.keys()&have.keys() if fresh[k]!=have[k]])

@pytest.fixture(scope='module')
def fresh(tmp_path_factory): return export(root/'nbs', tmp_path_factory.mktemp('export'))

def test_library_is_exactly_what_the_notebooks_export(fresh):
    assert not drift(fresh, modules(root)), 'run nbdev_export'

def test_drift_is_seen(fresh):
    have = dict(modules(root))
    have['lab/results.py'] = have['lab/results.py'].replace('def mean_ci', 'def mean_of')
    have['stale.py'] = ''; del have['lab/store.py']
    assert drift(fresh, have)==['lab/results.py differs from its notebook', 'lab/store.py is missing', 'stale.py is not exported by any notebook']

def test_each_module_has_one_notebook():
    names = [m for f in nbs for m in module_of(f)]
    assert len(names)==len(set(names)), f'exported twice: {sorted({n for n in names if names.count(n)>1})}'

@pytest.mark.parametrize('f', nbs, **ids)
def test_notebook_is_clean(f):
    nb = json.loads(f.read_text(encoding='utf-8'))
    before = json.dumps(nb, sort_keys=True)
    keys = (get_config().get('allowed_cell_metadata_keys') or '').split()
    clean_nb(nb, allowed_cell_metadata_keys=keys)
    assert json.dumps(nb, sort_keys=True)==before, f'{f.name} carries stray metadata; run nbdev_clean'

@pytest.mark.parametrize('f', nbs, **ids)
def test_notebook_is_small_and_free_of_machine_noise(f):
    txt = f.read_text(encoding='utf-8')
    assert len(txt) < 1_000_000, 'too big for GitHub to render comfortably'
    nb = json.loads(txt)
    outs = [o for c in nb['cells'] for o in c.get('outputs',[])]
    assert not any(o['output_type']=='error' for o in outs)
    text = json.dumps([{**o, 'data':{k:v for k,v in o.get('data', {}).items() if not k.startswith('image/')}} for o in outs])
    assert not re.search(r'/home/|/Users/|site-packages|it/s[\],]|\d+%\|', text)

@pytest.mark.parametrize('f', nbs, **ids)
def test_notebook_names_its_kernel_and_cells(f):
    "As nbdev_clean leaves them; JupyterLab adds the language and the Python version of the kernel, which nbdev_clean drops"
    nb = json.loads(f.read_text(encoding='utf-8'))
    assert nb['metadata']==dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    assert (nb['nbformat'],nb['nbformat_minor'])==(4,5)
    names = [c['id'] for c in nb['cells']]
    assert len(set(names))==len(names) and all(re.fullmatch(r'[\w-]{1,64}', n) for n in names)

@pytest.mark.parametrize('f', nbs, **ids)
def test_notebook_reads_well(f):
    code = [source(c) for c in cells(f, 'code')]
    assert not [s[:60] for s in code if s.count('\n')>=40], 'a cell of more than 40 lines'
    assert not [l for s in code for l in s.split('\n') if len(l)>110], 'a line of more than 110 characters'
    hidden = [s for s in code if re.match(r'#\|\s*hide\b', s)]
    assert len(hidden)<=1, 'more than one code cell is hidden: audits belong in tests/'
    assert not any(re.search(r'\bshow_doc\b', s) for s in code)
    if f.stem!='index': assert re.match(r'# .+\n\n> .+', source(cells(f, 'markdown')[0])), 'begin with a title and one line that says what it is'

@pytest.mark.parametrize('f', [f for f in (root/'cald').rglob('*.py') if f.name!='_modidx.py'], **ids)
def test_module_has_at_most_300_lines(f): assert len(f.read_text(encoding='utf-8').splitlines())<=300

machine = re.compile(r'/work/|/root/|/tmp/|/home/|/Users/') # a path that exists on one machine only

def test_no_path_of_a_machine_in_the_tree():
    files = [f for d in ('nbs','cald','tests','paper_figures','.ci') for f in (root/d).rglob('*') if f.suffix in {'.py','.ipynb','.md','.json','.csv',''} and f.is_file()]
    files += [f for f in root.glob('*') if f.is_file() and f.suffix!='.cff' and f.name!='LICENSE']
    bad = [str(f.relative_to(root)) for f in files if '__pycache__' not in f.parts and '.ipynb_checkpoints' not in f.parts
           and f!=Path(__file__) and machine.search(text_of(f))]
    assert not bad

def text_of(f):
    "The text of file `f`; of a notebook without its images, whose base64 may hold anything"
    t = f.read_text(encoding='utf-8')
    return re.sub(r'"image/png": "[^"]*"', '', t) if f.suffix=='.ipynb' else t

@pytest.mark.parametrize('notebook,page', [('index','README.md'), ('results','RESULTS.md')])
def test_pages_are_written_from_their_notebooks(tmp_path, notebook, page):
    from cald.paper.pages import write_markdown
    shutil.copytree(root/'nbs', tmp_path/'nbs', ignore=lambda d, fs: [f for f in fs if f!=f'{notebook}.ipynb'])
    write_markdown(tmp_path/'nbs'/f'{notebook}.ipynb', tmp_path/page)
    written = (tmp_path/page).read_text(encoding='utf-8')
    assert written==(root/page).read_text(encoding='utf-8'), 'run cald.paper.pages.write_markdown'

def test_readme_names_only_files_and_targets_that_exist():
    text = (root/'README.md').read_text(encoding='utf-8')
    links = [m for m in re.findall(r'\]\(([^)#\s]+)\)', text) if not re.match(r'[a-z]+:', m)]
    assert not [m for m in links if not (root/m).exists()]
    targets = set(re.findall(r'^(\w[\w-]*):', (root/'Makefile').read_text(encoding='utf-8'), re.M))
    assert set(re.findall(r'`make (\w+)', text))<=targets

def test_readme_links_every_notebook():
    text = (root/'README.md').read_text(encoding='utf-8')
    assert not [f.name for f in nbs if f.stem!='index' and f'](nbs/{f.name})' not in text]

def measured(names=None):
    "Every number of the CSV files of results (of those with `names` only), and half the width of every interval"
    for f in [*(f for f in (root/'paper_figures').rglob('*.csv') if names is None or f.stem in names), *(root/'cald/paper').glob('*.csv')]:
        for row in csv.DictReader(f.open(encoding='utf-8')):
            for cell in row.values():
                for v in re.findall(r'-?\d+\.?\d*(?:e-?\d+)?', cell): yield float(v)
            if row.get('low') and row.get('high'): yield (float(row['high'])-float(row['low']))/2

def unsupported(text, known):
    "Percentages and decimals in the prose and tables of `text` that no CSV holds, to the digits that are given"
    prose = re.sub(r'```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->|\b(?:Python|torch|transformers|nbdev|arXiv|Apache)[ :-][\d.]+', ' ', text, flags=re.S)
    said = re.findall(r'(?<![\w.:−-])(−?(?:\d+\.\d+|\d+(?= ?%)))(?![\w.]*\w)', prose)
    def held(s):
        d = len(s.partition('.')[2])
        return any(abs(float(s.replace('−', '-'))-k)<=.5000001*10**-d for v in known for k in (v, 100*v))
    return [s for s in said if s not in {'95'} and not held(s)]

@pytest.mark.parametrize('page', ['README.md','RESULTS.md'])
def test_numbers_in_pages_stand_in_a_csv(page):
    assert not unsupported((root/page).read_text(encoding='utf-8'), list(measured()))

def stated(f):
    "Decimals that the code of notebook `f` has: settings, which its prose may name; where it has no table of its own, those of its outputs too"
    from cald.paper.status import ARTEFACTS
    text = [source(c) for c in cells(f, 'code')]
    if f.stem not in {a.notebook for a in ARTEFACTS}: text += [json.dumps(o.get('text') or o.get('data', {}).get('text/plain', '')) for c in cells(f, 'code') for o in c['outputs']]
    return [float(v) for v in re.findall(r'(?<![\w.])\d*\.\d+(?:e-?\d+)?|(?<![\w.])\d+\.?e-?\d+', '\n'.join(text))]

def unsupported_in_notebook(f, md=None):
    "Numbers in the prose of notebook `f` that no CSV holds, of its own tables where it makes any; formulas and section numbers are left out"
    from cald.paper.status import ARTEFACTS
    own = {r for a in ARTEFACTS if a.notebook==f.stem for r in a.results}
    own |= {p.stem for p in (root/'paper_figures').glob('*_search.csv') if p.stem.removesuffix('_search') in own}
    md = '\n\n'.join(map(source, cells(f, 'markdown'))) if md is None else md
    md = re.sub(r'\$\$.+?\$\$|(?<!\w)\$[^$\n]+\$|[Ss]ections? \d+(?:\.\d+)*|§ ?\d+(?:\.\d+)*', ' ', md, flags=re.S)
    return unsupported(md, [*measured(own or None), *stated(f)])

@pytest.mark.parametrize('f', nbs, **ids)
def test_numbers_in_the_prose_of_notebooks_stand_in_a_csv(f):
    assert not unsupported_in_notebook(f)

def test_a_number_in_a_notebook_without_a_csv_is_seen():
    f = root/'nbs'/'05_speech.ipynb'
    assert unsupported_in_notebook(f, 'In Section 4.4 target guidance reaches a WER of 21.50, and with $k=0.123$ it is 7.77.')==['7.77']
    assert unsupported_in_notebook(f, 'The paper reports 6.41 % for hybrid.')==[]
    assert unsupported_in_notebook(f, 'Intents: 12.345 % are right.')==['12.345']

def test_a_number_without_a_csv_is_seen():
    assert unsupported('WER 12.3 %, 3.10 times faster, on Python 3.10', [12.28])==['3.10']
    assert unsupported('| target | 91.4 | `0.5` |', [.9142])==[]
    assert unsupported('an accuracy of 97 %', [96.2])==['97']
    assert unsupported('better by −10.3 points', [-10.27])==[] and unsupported('better by −10.3 points', [10.27])==['−10.3']

def test_csv_of_results_is_the_one_of_its_provenance():
    import hashlib
    for f in (root/'paper_figures').rglob('*.csv'):
        prov = json.loads(f.with_suffix('.json').read_text(encoding='utf-8'))
        assert hashlib.sha256(f.read_bytes()).hexdigest()==prov['csv_sha256'], f'{f.name} was edited after {f.stem}.json'
        assert 'smoke' not in prov['scale']

def python(code, cwd, **env):
    return subprocess.run([sys.executable,'-c',code], cwd=cwd, env={**os.environ, 'OMP_NUM_THREADS':'1', **dict(PYTHONPATH=str(root)), **env}, capture_output=True, text=True)

def test_imports_without_nbdev_or_mamba_ssm(tmp_path):
    names = [f'cald.{m}' for f in nbs for m in module_of(f)]
    code = f'''
import importlib, sys
class Absent:
    def find_spec(self, name, *a):
        if name.split('.')[0] in ('nbdev','execnb','mamba_ssm','pytest'): raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for m in {names}: importlib.import_module(m)
print(len({names}))'''
    r = python(code, tmp_path)
    assert r.returncode==0, r.stderr
    assert r.stdout.split()[-1]==str(len(names))

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built from a copy of the tree"
    tmp = tmp_path_factory.mktemp('wheel'); src = tmp/'src'; src.mkdir()
    shutil.copytree(root/'cald', src/'cald', ignore=shutil.ignore_patterns('__pycache__'))
    for f in ('settings.ini','setup.py','pyproject.toml','MANIFEST.in','README.md','LICENSE','NOTICE','CITATION.cff'): shutil.copy(root/f, src)
    subprocess.run([sys.executable,'-m','pip','wheel','-q','--no-deps','--no-build-isolation','-w',str(tmp),str(src)], check=True)
    return next(tmp.glob('*.whl'))

def test_wheel_holds_library_checkpoints_and_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for f in (root/'cald').rglob('*'):
        if f.is_file() and '__pycache__' not in f.parts: assert f.relative_to(root).as_posix() in names, f'{f.name} is not in the wheel'
    assert not [n for n in names if n.endswith('.ipynb') or n.startswith(('tests/','nbs/'))]

def test_wheel_has_the_command(wheel):
    z = zipfile.ZipFile(wheel)
    assert 'cald = cald.cli.main:main' in z.read(next(n for n in z.namelist() if n.endswith('entry_points.txt'))).decode()

def test_wheel_works_away_from_the_tree(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path/'site')
    (tmp_path/'cwd').mkdir()
    code = '''
import cald, torch, pathlib
from transformers import AutoModelForCTC, TrainingArguments, Wav2Vec2ForCTC
from cald.convert import convert
from cald.distill import Distiller
from cald.guidance import Target
from cald.lab.results import paper_numbers
from cald.pretrained import shipped
import contextlib, io
from cald.cli.main import main
for command in ('reproduce','status'):
    with contextlib.redirect_stderr(io.StringIO()) as said: assert main([command])==2
    assert 'needs the repository' in said.getvalue(), said.getvalue()
model = Wav2Vec2ForCTC.from_pretrained(shipped('wav2vec2-demo'), vocab_size=8, pad_token_id=0)
student = convert(model, to='mamba2')
data = [dict(input_values=torch.randn(4000), labels=torch.tensor([1,2])) for _ in range(8)]
args = TrainingArguments('out', max_steps=10, per_device_train_batch_size=2, save_strategy='no')
trainer = Distiller(student, args, train_dataset=data, guidance=Target(model)); trainer.train()
student.cpu().save_pretrained('student')
again = AutoModelForCTC.from_pretrained('student')
assert all(torch.equal(a, b) for a,b in zip(student.state_dict().values(), again.state_dict().values()))
print(trainer.state.global_step, len(paper_numbers('Table 3')), pathlib.Path(cald.__file__).parent)'''
    r = python(code, tmp_path/'cwd', PYTHONPATH=str(tmp_path/'site'), HF_HUB_OFFLINE='1')
    assert r.returncode==0, r.stderr
    assert r.stdout.split()[-3:]==['10', '15', str(tmp_path/'site'/'cald')]
