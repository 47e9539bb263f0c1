"The command `cald`: what a notebook cannot test, because it takes processes that die or a copy of the whole project."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from common import module_name
from cald.paper.status import Artefact,ARTEFACTS,module_hash,modules_of,result_state,stamp,status
from cald.cli.main import main
from cald.paper.reproduce import committed_record,estimate_minutes,reproduce
from cald.files import write_json

root = Path(__file__).parents[1]

def cald(*args, cwd, stdout=subprocess.PIPE):
    "Run the `cald` of checkout `cwd` as the console script does"
    code = "import sys; sys.argv[0] = 'cald'; from cald.cli.main import main; sys.exit(main())"
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
        write_json(folder/f'{r}.json', dict(scale=['demo'], seeds=[0,1,2], cells={f'{a.name} wav2vec2-demo softmax standard':[0,1,2]}, code=[{f'cald.{m}':module_hash(m) for m in modules_of(a)}], commit='0'*40, dirty=False, seconds=1., runs=[], csv_sha256=hashlib.sha256((folder/f'{r}.csv').read_bytes()).hexdigest()))
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
        depend = {a.name for a in here if module in modules_of(a)}
        change(f)
        assert stale(fresh/'fresh')==depend, module
        f.write_text(was)
    for f in (fresh/'cald').rglob('*.py'): change(f, '\n# a comment\n')
    assert not stale(fresh/'fresh')

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

def test_a_table_depends_on_the_modules_that_its_notebook_imports():
    modules = {a.name: set(modules_of(a)) for a in here}
    for name,table,tasks in (('table1','table1','text'), ('table2','table2',None), ('table3','table3','speech')):
        assert {'ops','mixers','convert','guidance','distill','lab.experiment',f'paper.{table}'} <= modules[name]
        assert not tasks or f'tasks.{tasks}' in modules[name]
        assert not {m for m in modules[name] if m.startswith(('paper.','pretrain.'))}-{f'paper.{table}'}
    assert 'data.speech' not in modules['table1'] and 'data.text' not in modules['table3']
    assert {'paper.table1','paper.table3','paper.trajectories'} <= modules['fig3']

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
run = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from cald.paper.status import Artefact; from cald.paper.reproduce import reproduce; reproduce(seeds=10, artefacts={toys})"

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
        assert family, 'the kernel of the notebook'
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

def test_status_takes_names_and_shortens_reasons(capsys):
    assert main(['status','table3'])==0
    said = capsys.readouterr().out
    assert 'table3' in said and 'table2' not in said and max(map(len, said.splitlines()))<200
    assert main(['status','tabel3'])==2 and "did you mean 'table3'" in capsys.readouterr().err

def test_compare_says_its_units_and_its_rule(capsys):
    assert main(['compare'])==0
    said = capsys.readouterr().out
    assert ' perplexity ' in said and ' points ' in said and 'agrees: same sign' in said

def test_trainings_that_two_results_share_are_counted_once():
    fig4,cka = (next(a for a in ARTEFACTS if a.name==name) for name in ('fig4','cka'))
    made = set(committed_record(fig4)['runs'])
    assert estimate_minutes(cka, 'demo', 1, 2)>10 and estimate_minutes(cka, 'demo', 1, 2, made)==0

def test_a_reader_that_has_had_enough_is_no_error():
    ours,theirs = os.pipe()
    os.close(ours) # as `head` does when it has its lines
    done = cald('status', cwd=root, stdout=theirs)
    os.close(theirs)
    assert done.returncode==1 and not done.stderr

def test_values_and_folders_that_cannot_work_are_refused(tmp_path, capsys):
    for args,message in [('reproduce table3 -n --workers -1', '--workers cannot be negative'),
                         (f'status --out {tmp_path}/nowhere', 'is not a folder'), (f'compare --out {tmp_path}/nowhere', 'is not a folder')]:
        assert main(args.split())==2 and message in capsys.readouterr().err, args
