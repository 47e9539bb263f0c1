"The command `cald`: what a notebook cannot test, because it takes processes that die, a copy of the whole project, or a browser."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from common import imports_of, module_name
from cald.paper.status import (Artefact,ARTEFACTS,cells_hash,fill_placeholders,module_hash,notebook_defaults,
                               result_state,SAME,stamp,status)
from cald.paper.cli import main,reproduce
from cald.lab.results import without_folders
from cald.files import write_json

root = Path(__file__).parents[1]

def cald(*args, cwd, stdout=subprocess.PIPE):
    "Run the `cald` of checkout `cwd` as the console script does"
    code = "import sys; sys.argv[0] = 'cald'; from cald.paper.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, '-c', code, *args], cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH':str(cwd), 'OMP_NUM_THREADS':'1'})

@pytest.fixture
def copy(tmp_path, monkeypatch):
    "A copy of the project, with this test in its folder; what is judged there is the copy's code"
    for d in ('cald','nbs','paper_figures'): shutil.copytree(root/d, tmp_path/'p'/d, ignore=shutil.ignore_patterns('__pycache__','.ipynb_checkpoints'))
    shutil.copy(root/'settings.ini', tmp_path/'p')
    monkeypatch.chdir(tmp_path/'p')
    for k in ('CALD_RUNS','CALD_OUT','CALD_DATA_DIR'): monkeypatch.delenv(k, raising=False)
    return tmp_path/'p'

def pretend_fresh(a, folder):
    "A result of `a` as a run of its notebook by this code would leave it"
    import hashlib
    folder.mkdir(exist_ok=True)
    for r in a.results:
        (folder/f'{r}.csv').write_text('mode,mean\nstandard,1\n')
        write_json(folder/f'{r}.json', dict(scale=['demo'], seeds=[0,1,2], cells={f'{a.name} wav2vec2-demo softmax standard':[0,1,2]}, parameters=without_folders({**notebook_defaults(a.path), **fill_placeholders(a.params), 'scale':'demo'}),
            code=[{f'cald.{m}':module_hash(m) for m in a.modules.split()}], commit='0'*40, dirty=False, seconds=1., runs=[], csv_sha256=hashlib.sha256((folder/f'{r}.csv').read_bytes()).hexdigest()))
    stamp(a, folder)

here = [a for a in ARTEFACTS if (root/'nbs'/f'{a.notebook}.ipynb').exists()]

@pytest.fixture
def fresh(copy):
    "Every artefact that can be made here, fresh, in a folder of the copy"
    for a in here: pretend_fresh(a, copy/'fresh')
    assert set(status(copy/'fresh', here).state)=={'fresh'}
    return copy

def stale(folder): return {n for n,s in status(folder, here).state.items() if s=='stale'}

def change(path, text='\nTOUCHED = 1\n'): path.write_text(path.read_text()+text)

def test_other_code_makes_exactly_the_tables_stale_that_depend_on_it(fresh):
    for f in sorted((fresh/'cald').rglob('*.py')):
        module,was = module_name(f, fresh/'cald'),f.read_text()
        change(f)
        assert stale(fresh/'fresh')=={a.name for a in here if module in a.modules.split()}, module
        f.write_text(was)
    for f in (fresh/'cald').rglob('*.py'): change(f, '\n# a comment\n')
    assert not stale(fresh/'fresh')
    assert 'data.text' not in next(a for a in here if a.name=='table3').modules.split()

def test_changes_that_make_no_difference_are_of_this_tree_and_of_a_record():
    records = [json.loads(f.read_text()) for f in (root/'paper_figures').glob('**/*.json')]
    was = {h for p in records for s in p['code'] for h in s.values()} | {h for p in records if 'made_from' in p for h in (*p['made_from']['modules'].values(), p['made_from']['cells'])}
    for s in SAME:
        now = module_hash(s.name) or cells_hash(root/'nbs'/f'{s.name}.ipynb')
        assert s.was and now.startswith(s.now) and all(any(str(h).startswith(w) for h in was) for w in s.was.split()), f'{s.name}: not of this tree, or of no record'

def test_other_cells_make_the_tables_of_that_notebook_stale(fresh):
    def add(f, **cell):
        nb = json.loads(f.read_text())
        nb['cells'].append(dict(id='new', metadata={}, **cell)); f.write_text(json.dumps(nb))
    for f in sorted((fresh/'nbs').glob('*.ipynb')):
        was = f.read_text()
        add(f, cell_type='code', outputs=[], execution_count=None, source=['digits = 3'])
        assert stale(fresh/'fresh')=={a.name for a in here if a.notebook==f.stem}, f.name
        f.write_text(was)
    for f in (fresh/'nbs').glob('*.ipynb'): add(f, cell_type='markdown', source=['More words.'])
    assert not stale(fresh/'fresh')

def test_an_edited_csv_another_source_and_a_lost_file_are_seen(fresh):
    a = next(a for a in here if a.name=='table3')
    curves = fresh/'fresh'/'table3_curves.json'
    curves.write_text(json.dumps({**json.loads(curves.read_text()), 'commit':'1'*40})) # a file of another run was copied there
    assert result_state(a, fresh/'fresh')['why']=='table3_curves is not of the run that made table3'
    weights = fresh/'cald'/'checkpoints'/'wav2vec2-demo'/'model.safetensors'
    weights.write_bytes(weights.read_bytes()+b'\0')
    assert 'source wav2vec2-demo' in result_state(a, fresh/'fresh')['why']
    change(fresh/'fresh'/'table3.csv', 'hybrid,2\n')
    assert 'table3.csv was edited' in result_state(a, fresh/'fresh')['why']
    (fresh/'fresh'/'table3_modes.csv').unlink()
    assert 'table3_modes is not complete' in result_state(a, fresh/'fresh')['why']

def closure(module, seen=None):
    "The modules of cald that `module` imports, and those that they import"
    seen = set() if seen is None else seen
    if module in seen: return seen
    seen.add(module)
    for m in imports_of(module, later=True): closure(m, seen)
    return seen

# Modules that the notebooks reach and that decide none of their numbers: files, records and plans; and what they bring along for text
NOT_COUNTED = {'files','lab.grid','lab.store','lab.queue','lab.results'}
FOR_SPEECH = {'data.speech','data.voices','data.commands'}

@pytest.mark.parametrize('a', here, ids=lambda a: a.name)
def test_the_modules_of_an_artefact_are_those_that_its_notebook_imports(a):
    cells = json.loads((root/'nbs'/f'{a.notebook}.ipynb').read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type']=='code')
    first = [*re.findall(r'default_exp (\S+)', text), *re.findall(r'^from cald\.([\w.]+) import', text, re.M)]
    reached = set().union(*map(closure, first))
    named = set(a.modules.split())
    assert named<=reached, sorted(named-reached)
    extra = reached-named-NOT_COUNTED-(set() if 'paper.table3' in named else FOR_SPEECH)
    assert not extra, sorted(extra)

# Processes that die. (A shell in the background lets its children ignore SIGINT, so they are told to heed it.) The project is a small one, whose notebook "trains" ten runs of half a second.

cell = """import time
from cald.lab.grid import grid, scale_settings
from cald.lab.queue import train_missing
from cald.lab.results import summarise, write_table
from cald.lab.store import Store, out_folder
scale_settings('toy-paper', demo=dict(steps=2))
def fit(c, run): time.sleep(.6); return dict(score=float(c.seed))
results = train_missing(grid(task='toy-paper', source='toy', mixer='none', mode='plain', scale=scale, seed=seeds), fit, Store(), 'points')
write_table('toy', summarise(results, 'mode', 'task', 'score'), results, out_folder(out, scale), params=dict(scale=scale, seeds=seeds, workers=workers))"""
toys = [Artefact('toy', 'A toy', 'toy', minutes=1)]
run = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from cald.paper.status import Artefact; from cald.paper.cli import reproduce; reproduce(seeds=10, artefacts={toys})"

@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path/'nbs').mkdir(); (tmp_path/'settings.ini').write_text('lib_name = cald\n')
    code = [dict(cell_type='code', id=f'c{i}', source=s, metadata=dict(tags=t), outputs=[], execution_count=None)
            for i,(s,t) in enumerate([("scale:str = 'demo'\nseeds:list[int] = [0]\nout:str = ''\nworkers:int = 0", ['parameters']), (cell, [])])]
    meta = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    (tmp_path/'nbs'/'toy.ipynb').write_text(json.dumps(dict(cells=code, metadata=meta, nbformat=4, nbformat_minor=5)))
    monkeypatch.chdir(tmp_path)
    for k in ('CALD_RUNS','CALD_OUT'): monkeypatch.delenv(k, raising=False)
    for k,v in dict(PYTHONPATH=str(root), OMP_NUM_THREADS='1').items(): monkeypatch.setenv(k, v)
    return tmp_path

def results(d): return {f:f.stat().st_mtime_ns for f in (d/'runs').glob('*/result.json')}

def start(): return subprocess.Popen([sys.executable, '-c', run], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def test_killed_it_leaves_no_process_and_goes_on_where_it_was(toy, capsys):
    done = {}
    for n,how in ((2,signal.SIGINT), (4,signal.SIGTERM), (6,signal.SIGKILL)):
        p = start()
        while len(results(toy))<n and p.poll() is None: time.sleep(.02)
        assert p.poll() is None, p.communicate()[1]
        family = psutil.Process(p.pid).children(recursive=True)
        assert len(family)>=2, 'papermill and its kernel'
        p.send_signal(how); p.wait(30)
        gone,alive = psutil.wait_procs(family, 15)
        assert not alive, f'a process stayed behind after {how.name}'
        assert {f:t for f,t in results(toy).items() if f in done}==done, 'a finished run was trained again'
        done = results(toy)
        assert n<=len(done)<10
    reproduce(seeds=10, artefacts=toys)
    assert len(results(toy))==10 and {f:t for f,t in results(toy).items() if f in done}==done, 'a finished run was trained again'
    capsys.readouterr()
    reproduce(seeds=10, artefacts=toys)
    assert 'Nothing to do' in capsys.readouterr().out

def test_the_notebooks_use_as_many_workers_as_they_are_given(toy):
    folder = reproduce(seeds=1, artefacts=toys, workers=3)
    assert json.loads((folder/'toy.json').read_text())['parameters']['workers']==3

def test_a_checkout_of_another_cald_is_refused(copy, monkeypatch, capsys):
    monkeypatch.chdir(copy/'nbs')
    assert main(['status'])==2 and 'not the one of this checkout' in capsys.readouterr().err

def test_status_has_what_another_machine_made_without_what_it_did_not(capsys):
    assert main(['status'])==0
    first,*more = capsys.readouterr().out.strip().split('\n\n')
    gpu, = [t for t in more if t.startswith('paper_figures/gpu/')]
    assert re.search(r'^table1 .*demo', first, re.M) and re.search(r'^efficiency .*paper', gpu, re.M)
    assert 'table1' not in gpu and 'missing' not in gpu

def test_a_reader_that_has_had_enough_is_no_error():
    ours,theirs = os.pipe()
    os.close(ours) # as `head` does when it has its lines
    done = cald('status', cwd=root, stdout=theirs)
    os.close(theirs)
    assert done.returncode==1 and not done.stderr

# The report in a real browser

browser = next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome'))), None)
watch = """<script>window.addEventListener('load', () => { const bad = [...document.images].filter(i => !i.complete || !i.naturalWidth);
document.body.setAttribute('data-images', document.images.length); document.body.setAttribute('data-broken', bad.map(i => i.src.slice(0, 80)).join(' ')); });</script>"""

@pytest.mark.skipif(not browser, reason='no Chromium on this system')
def test_a_report_leaves_alone_what_it_did_not_write(tmp_path, capsys):
    mine,shown = tmp_path/'results'/'mine.csv',tmp_path/'shown'
    mine.parent.mkdir(); mine.write_text('mine'); shown.mkdir()
    assert main(['report','--to',str(tmp_path)])==2 and 'has other files' in capsys.readouterr().err
    assert main(['report','--to',str(shown),'--out',str(shown)])==2 and 'give another folder' in capsys.readouterr().err
    assert mine.read_text()=='mine'

def test_numbers_and_folders_that_cannot_be_are_told(tmp_path, capsys):
    for args,says in [('reproduce table3 -n --workers -1','--workers cannot be negative'), ('reproduce table3 -n --price -1','--price cannot be negative'),
                      (f'status --out {tmp_path}/nowhere','is no folder'), (f'compare --out {tmp_path}/nowhere','is no folder')]:
        assert main(args.split())==2 and says in capsys.readouterr().err, args

def test_the_report_opens_in_a_browser_and_shows_every_figure(copy):
    r = cald('report', '--to', 'report', cwd=copy)
    assert r.returncode==0, r.stderr
    pages = sorted((copy/'report').rglob('*.html'))
    assert {p.stem for p in pages if p.parent.name=='notebooks'}=={f.stem for f in (root/'nbs').glob('*.ipynb')}
    figures = {f'results/{n}.png' for a in here for n in a.results if (root/'paper_figures'/f'{n}.png').exists()}
    assert figures==set(re.findall(r'src="(results/[^"]+)"', (copy/'report'/'index.html').read_text()))
    for p in [copy/'report'/'index.html', *(copy/'report'/'notebooks'/f'{n}.html' for n in ('05_speech','00_ops','index'))]:
        p.with_suffix('.watched.html').write_text(p.read_text().replace('</body>', watch+'</body>'))
        b = subprocess.run([browser, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', f'--user-data-dir={copy}/profile', '--enable-logging=stderr', '--virtual-time-budget=5000', '--dump-dom',
                            p.with_suffix('.watched.html').as_uri()], capture_output=True, text=True, timeout=180)
        dom = b.stdout
        assert re.search(r'data-broken=""', dom), (p.name, re.findall(r'data-broken="[^"]*"', dom), b.stderr[-500:])
        assert int(re.search(r'data-images="(\d+)"', dom)[1])>=p.read_text().count('<img')>0 or p.stem=='index'
        assert not re.findall(r'CONSOLE.*', b.stderr), p.name
