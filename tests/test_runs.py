"The run store and its tables: what needs other processes, kills, faults, or many cases"
import ast, hashlib, json, multiprocessing, os, re, shutil, socket, time
from dataclasses import fields, replace
from pathlib import Path
import numpy as np, pandas as pd, psutil, pytest, torch
from huggingface_hub import constants
from safetensors.torch import save_file
from cald.files import cache_folder,hash_files,read_json,runs_folder,write_json
from cald.lab.grid import Cell,cell,grid,run_key,scale_settings,SCALES
from cald.lab.queue import train_missing
from cald.lab.results import (check_parameters,compare_with_committed,mean_ci,paper_numbers,provenance,reason_to_keep,
                              summarise,write_figure,write_table)
from cald.lab.store import fingerprint,git_state,normalised_ast,out_folder,result_row,Store
from cald.paper.pages import write_markdown
from cald.lab import queue
from cald.lab.grid import SETTINGS

root = Path(__file__).parents[1]
base = dict(steps=10, lr=1e-3, layers=(0,1), bf16=False, loss='default')

@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(SETTINGS, 'toy', {s:dict(base) for s in SCALES})
    return cell('toy', source='a', mixer='mamba2', mode='target', seed=1)

# One process imports the library once and forks the others, which start in no time
ctx = multiprocessing.get_context('forkserver')
ctx.set_forkserver_preload(['cald.lab.queue'])

def child(fn, args, env):
    os.environ.update(env)
    fn(*args)

def launch(fn, *args, **env):
    p = ctx.Process(target=child, args=(fn, args, env)); p.start()
    return p

def finish(*ps):
    for p in ps: p.join(timeout=120)
    assert [p.exitcode for p in ps]==[0]*len(ps)

# --- the key ---

def other(v):
    "A value of the same kind that is not `v`"
    if isinstance(v, bool): return not v
    if isinstance(v, str): return v+'x'
    if isinstance(v, tuple): return (*v, 7)
    return v+1

def test_key_changes_with_every_field(toy):
    for f in fields(Cell):
        if f.name in ('overrides','scale'): continue
        assert run_key(replace(toy, **{f.name:other(getattr(toy, f.name))}), 'h')!=run_key(toy, 'h'), f.name
    assert len({run_key(replace(toy, scale=s), 'h') for s in SCALES})==len(SCALES)
    assert run_key(toy, 'h')!=run_key(toy, 'g')

@pytest.mark.parametrize('name', base)
def test_key_changes_with_every_override_and_every_setting_of_the_scale(toy, monkeypatch, name):
    keys = [run_key(toy, 'h'), run_key(cell('toy', source='a', mixer='mamba2', mode='target', seed=1, **{name:other(base[name])}), 'h')]
    monkeypatch.setitem(SETTINGS, 'toy', {s:{**base, name:other(other(base[name])) if not isinstance(base[name], bool) else None} for s in SCALES})
    assert len({*keys, run_key(toy, 'h')})==3

def test_key_does_not_depend_on_order_process_or_how_the_default_is_spelt(toy, tmp_path):
    kw = dict(source='a', mixer='mamba2', mode='target', seed=1)
    a,b = cell('toy', **kw, steps=3, lr=.1),cell('toy', lr=.1, steps=3, **kw)
    assert a==b and run_key(a, 'h')==run_key(b, 'h')
    assert run_key(cell('toy', **kw, steps=base['steps'], lr=None), 'h')==run_key(toy, 'h')
    finish(launch(write_key, kw, tmp_path/'key'))
    assert (tmp_path/'key').read_text()==run_key(toy, 'h')

def write_key(kw, file):
    scale_settings('toy', demo=dict(base))
    file.write_text(run_key(cell('toy', **kw), 'h'))

def checkpoint(folder, value=1.):
    "The files of a checkpoint"
    folder.mkdir(parents=True)
    save_file(dict(w=torch.full((2,), value)), folder/'model.safetensors')
    (folder/'config.json').write_text(json.dumps(dict(model_type='bert', hidden_size=8)))
    return folder

def test_a_checkpoint_is_known_by_its_content(toy, tmp_path, monkeypatch):
    "Under a relative path, an absolute path, another name, and a hub id"
    here = checkpoint(tmp_path/'ckpt')
    shutil.copytree(here, tmp_path/'elsewhere')
    hub = tmp_path/'hub'
    shutil.copytree(here, hub/'models--me--ckpt'/'snapshots'/'1234')
    (hub/'models--me--ckpt'/'refs').mkdir()
    (hub/'models--me--ckpt'/'refs'/'main').write_text('1234')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(hub))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path/'runs')
    def run(source): return store.run(cell('toy', source=str(source)), 'h')
    runs = [run(source) for source in (here,'ckpt','./ckpt','elsewhere','me/ckpt')]
    assert len({r.key for r in runs})==len({r.folder for r in runs})==1
    assert [r.cell.source for r in runs[-2:]]==['elsewhere','me/ckpt'] # where each is loaded from
    runs[0].finish(dict(a=1))
    assert runs[-1].done and runs[0].sessions[0]['source']==str(here)
    (again,) = store.runs()
    assert store.behind(result_row(again)['record']).folder==runs[0].folder
    assert run(checkpoint(tmp_path/'other', 2.)).key!=runs[0].key, 'other weights'
    (here/'config.json').write_text(json.dumps(dict(model_type='bert', hidden_size=8, hidden_act='relu')))
    assert run(here).key!=runs[0].key, 'another configuration'
    with pytest.raises(OSError, match='me/none is neither a folder nor'): run('me/none')

def test_a_source_with_a_name_keeps_the_key_that_it_has_always_had(toy, tmp_path):
    c = cell('toy', source='roberta-demo')
    assert Store(tmp_path).run(c, 'h').key==run_key(c, 'h')

def test_numbers_of_numpy_do_not_make_another_key(toy):
    assert run_key(replace(toy, seed=np.int64(1)), 'h')==run_key(toy, 'h')

def test_unknown_settings_and_incomplete_scales_are_errors(toy):
    with pytest.raises(ValueError, match="'stesp'.*did you mean 'steps'"): cell('toy', stesp=3)
    with pytest.raises(ValueError, match='scale'): cell('toy', scale='big')
    with pytest.raises(ValueError, match=r"paper lacks \['lr'\]"): scale_settings('t', demo=dict(a=1, lr=1), paper=dict(a=1))
    with pytest.raises(ValueError, match='twice'): Cell('toy', overrides=(('a',1),('a',2)))
    with pytest.raises(TypeError, match='JSON'): run_key(cell('free', f=len), 'h')

def finished(folder):
    "The finished runs of the store in `folder` as rows"
    return pd.DataFrame([result_row(r) for r in Store(folder).runs() if r.done])

def states(store): return [r.state() for r in store.runs()]

# --- kills and several processes ---

def share(root, who):
    def fn(c, run):
        with open(root/'calls', 'a') as f: f.write(f'{c.seed}\n')
        seen = run.metrics()
        for s in range(0 if seen.empty else int(seen.step.max())+1, 8):
            run.log(step=s, who=who); time.sleep(.04)
        return dict(who=who)
    train_missing(grid(task='t', seed=[0,1,2]), fn, Store(root), 'h', poll=.05)

def wait_for(test, seconds=60):
    end = time.monotonic()+seconds
    while not test():
        assert time.monotonic()<end, 'it did not happen'
        time.sleep(.02)

def test_killed_run_is_taken_over_and_resumed(tmp_path):
    st,p = Store(tmp_path),launch(share, tmp_path, 'first')
    r = st.run(cell('t', seed=0), 'h')
    wait_for(lambda: len(r.metrics())>=3)
    assert r.owner()==f'process {p.pid} on {socket.gethostname()}' and states(st)==['running']
    p.kill(); p.join() # SIGKILL
    assert r.owner() is None and states(st)==['unfinished'] and not r.done
    with open(r.folder/'metrics.jsonl', 'ab') as f: f.write(b'{"step": 3, "wh') # torn by the kill
    kept = len(r.metrics())
    finish(launch(share, tmp_path, 'second'))
    assert list(r.metrics().step)==list(range(8))
    assert list(r.metrics().who)==['first']*kept+['second']*(8-kept)
    assert len(r.sessions)==2 and r.result==dict(who='second')
    assert r.record['seconds']>=r.metrics().seconds.max()

def test_several_processes_share_a_grid_and_train_each_run_once(tmp_path):
    finish(*(launch(share, tmp_path, w) for w in 'abc'))
    for r in Store(tmp_path).runs():
        assert len(r.sessions)==1 and list(r.metrics().step)==list(range(8))
    assert len(finished(tmp_path))==3 and sorted((tmp_path/'calls').read_text().split())==['0','1','2']

def on_a_rank(root):
    import torch, torch.distributed as dist
    def fn(c, run):
        x = torch.tensor([1.+int(os.environ['RANK'])]); dist.all_reduce(x)
        run.log(step=0, total=x.item())
        return dict(total=x.item(), rank=int(os.environ['RANK']))
    df = train_missing(grid(task='t', seed=[0,1]), fn, Store(root), 'h', poll=.05)
    assert df.total.tolist()==[3.,3.] and df['rank'].tolist()==[0,0]

def help_forever():
    "What the helper of the next test does"
    time.sleep(600)

def hold_helper(tmp, pid):
    with queue.helper_processes(1, f'{__name__}:help_forever', tmp) as procs:
        Path(pid).write_text(str(procs[0].pid))
        time.sleep(600)

def test_helpers_end_when_their_process_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(root), str(root/'tests')]))
    pid = tmp_path/'pid'
    p = launch(hold_helper, str(tmp_path), str(pid), PYTHONPATH=os.environ['PYTHONPATH'])
    for _ in range(600):
        if pid.exists() and pid.read_text(): break
        time.sleep(.1)
    helper = psutil.Process(int(pid.read_text()))
    assert helper.is_running() and helper.status()!=psutil.STATUS_ZOMBIE, (tmp_path/'helper-1.log').read_text()
    p.kill(); p.join()
    def ended(): return not helper.is_running() or helper.status()==psutil.STATUS_ZOMBIE
    for _ in range(300):
        if ended(): break
        time.sleep(.1)
    assert ended()

def test_a_helper_that_fails_leaves_the_work_to_others(tmp_path):
    threads = torch.get_num_threads()
    with queue.helper_processes(2, 'cald.no_such_module:work', tmp_path) as procs:
        for p in procs: p.wait(timeout=60)
    assert all(p.returncode for p in procs) and torch.get_num_threads()==threads
    assert 'no_such_module' in (tmp_path/'helper-2.log').read_text()

def test_a_helper_imports_nothing_that_lies_in_the_working_folder_by_chance(tmp_path, monkeypatch):
    (tmp_path/'json.py').write_text("open('planted', 'w')")
    (tmp_path/'mine.py').write_text('def work(): pass')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(root))
    with queue.helper_processes(1, 'mine:work', tmp_path) as procs: procs[0].wait(timeout=120)
    assert procs[0].returncode==0, (tmp_path/'helper-1.log').read_text()
    assert not (tmp_path/'planted').exists()

def test_what_another_process_has_done_meanwhile_is_not_counted_as_left(tmp_path):
    cells = grid(task='counted', source='s', mixer='none', mode='m', seed=range(4))
    mine,theirs = Store(tmp_path),Store(tmp_path).run(cells[1], 'h')
    def fit(c, run):
        if c.seed==2: theirs.start(); theirs.finish(dict(x=1)); theirs.release() # it was passed over as taken, and is done before the last one begins
        return dict(x=0)
    assert theirs.acquire()
    train_missing(cells, fit, mine, 'h')
    assert [l.split()[0] for l in (tmp_path/'progress.log').read_text().splitlines()]==['4','3','1','all']

@pytest.mark.parametrize('workers,order', [(1,['short 0','long 0','short 1','long 1']), (2,['short 0','long 0','long 1','short 1'])])
def test_with_others_beside_it_the_long_runs_come_first(tmp_path, workers, order):
    calls = []
    def fn(c, run):
        calls.append(f'{c.task} {c.seed}'); time.sleep(.2*(c.task=='long'))
        return dict(x=0)
    train_missing([cell(t, seed=s) for s in (0,1) for t in ('short','long')], fn, Store(tmp_path), 'h', workers=workers)
    assert calls==order

def test_one_run_on_two_ranks(tmp_path):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES='')
    finish(*(launch(on_a_rank, tmp_path, RANK=str(i), LOCAL_RANK=str(i), **env) for i in range(2)))
    assert len(finished(tmp_path))==2
    for r in Store(tmp_path).runs(): assert len(r.sessions)==1 and len(r.metrics())==1

@pytest.mark.parametrize('when', ['before','after'])
def test_write_is_all_or_nothing(tmp_path, monkeypatch, when):
    f = tmp_path/'a.json'; write_json(f, dict(a=1))
    real = os.replace
    def dies(*a):
        if when=='after': real(*a)
        raise KeyboardInterrupt
    monkeypatch.setattr(os, 'replace', dies)
    with pytest.raises(KeyboardInterrupt): write_json(f, dict(a=2))
    assert read_json(f)==dict(a=1 if when=='before' else 2)

def test_repeated_steps_after_a_kill_count_once(tmp_path):
    r = Store(tmp_path).run(cell('t'), 'h')
    for s in range(5): r.log(step=s, loss=s)
    r.log(step=4, wer=.5); r.log(note='no step')
    again = Store(tmp_path).run(cell('t'), 'h')
    for s in range(3, 6): again.log(step=s, loss=10*s)
    assert list(again.metrics().dropna(subset='loss').loss)==[0,1,2,30,40,50]
    assert again.metrics().get('wer') is None and (again.metrics().note=='no step').sum()==1

def test_damaged_files_are_named(tmp_path):
    r = Store(tmp_path).run(cell('t'), 'h'); r.log(step=1); r.log(step=2); r.finish(dict(a=1))
    lines = (r.folder/'metrics.jsonl').read_bytes().splitlines(keepends=True)
    (r.folder/'metrics.jsonl').write_bytes(b'garbage\n'+lines[1])
    with pytest.raises(ValueError, match='metrics.jsonl, line 1'): r.metrics()
    (r.folder/'result.json').write_text('{"key": ')
    with pytest.raises(ValueError, match='result.json is damaged'): r.record

def test_folder_of_another_run_is_not_used(tmp_path):
    r = Store(tmp_path).run(cell('t'), 'h'); r.log(step=1)
    conf = read_json(r.folder/'config.json'); conf['data'] = 'other'; write_json(r.folder/'config.json', conf)
    with pytest.raises(ValueError, match='holds another run'): Store(tmp_path).run(cell('t'), 'h').log(step=2)

# --- what is trained, and when again ---

def counting(calls): return lambda c, run: calls.append(c.seed) or dict(a=c.seed)

def test_finished_runs_are_not_trained_again(tmp_path):
    calls,cells = [],grid(task='t', seed=[0,1])
    first = train_missing(cells, counting(calls), Store(tmp_path), 'h')
    again = train_missing(cells, counting(calls), Store(tmp_path), 'h')
    assert calls==[0,1]
    pd.testing.assert_frame_equal(first, again)
    train_missing(cells, counting(calls), Store(tmp_path), 'other data')
    assert calls==[0,1,0,1]
    train_missing(cells, counting(calls), Store(tmp_path), dict(t='other data'))
    assert calls==[0,1,0,1]

def test_failure_leaves_the_finished_ones_and_frees_the_lock(tmp_path):
    def fails(c, run):
        run.log(step=0)
        if c.seed==1: raise FloatingPointError('loss is not finite at step 3')
        return dict(a=1)
    cells = grid(task='t', seed=[0,1,2])
    with pytest.raises(FloatingPointError): train_missing(cells, fails, Store(tmp_path), 'h')
    st = Store(tmp_path)
    assert sorted(states(st))==['fresh','unfinished']
    calls = []; train_missing(cells, counting(calls), st, 'h')
    assert calls==[1,2]

def test_fn_without_result_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match='has no result'): train_missing([cell('t')], lambda c, run: None, Store(tmp_path), 'h')

def test_a_result_cannot_hide_a_column_of_the_record(tmp_path):
    r = Store(tmp_path).run(cell('t'), 'h')
    with pytest.raises(ValueError, match=r"seconds.*other names"): r.finish(dict(seconds=1., wer=2.))
    assert not r.done

def test_numbers_that_are_not_finite_are_kept_as_null(tmp_path):
    r = Store(tmp_path).run(cell('t'), 'h'); r.log(step=np.int64(1), loss=np.float32('nan')); r.finish(dict(wer=float('inf'), ok=np.float32(.5)))
    assert r.result==dict(wer=None, ok=.5)
    assert 'NaN' not in (r.folder/'metrics.jsonl').read_text()

@pytest.fixture
def module(tmp_path, monkeypatch):
    f = tmp_path/'mods'/'toy_code.py'; f.parent.mkdir()
    f.write_text('def f(x):\n    "doc"\n    return x+1\n')
    monkeypatch.syspath_prepend(str(f.parent))
    return f

def test_stale_runs_are_told_and_kept_until_asked(tmp_path, module, capsys):
    calls,cells,st = [],grid(task='t', seed=[0,1]),lambda: Store(tmp_path/'runs', ['toy_code'])
    train_missing(cells, counting(calls), st(), 'h')
    module.write_text('# a comment\ndef f(x):\n    "another doc"\n\n    return (x + 1)\n')
    assert states(st())==['fresh','fresh']
    module.write_text('def f(x):\n    return x+2\n')
    assert states(st())==['stale','stale'] and all(r.changed()==['toy_code'] for r in st().runs())
    train_missing(cells, counting(calls), st(), 'h')
    assert calls==[0,1] and '2 of 2 runs were made or begun by other code (changed: toy_code)' in capsys.readouterr().out
    train_missing(cells, counting(calls), st(), 'h', retrain=True)
    assert calls==[0,1,0,1] and states(st())==['fresh','fresh'] and not capsys.readouterr().out
    module.unlink()
    assert states(Store(tmp_path/'runs'))==['stale','stale']
    with pytest.raises(ValueError, match='no such modules'): st()

def test_unfinished_run_that_other_code_began_is_told_and_made_afresh_when_asked(tmp_path, module, capsys):
    st = lambda: Store(tmp_path/'runs', ['toy_code'])
    def half(c, run): run.log(step=1); raise InterruptedError
    for retrain,steps in ((False,[1,2]),(True,[2])):
        with pytest.raises(InterruptedError): train_missing([cell('t', seed=int(retrain))], half, st(), 'h')
        module.write_text(module.read_text().replace('+1', '+1+1')); capsys.readouterr()
        train_missing([cell('t', seed=int(retrain))], lambda c, run: run.log(step=2) or dict(a=1), st(), 'h', retrain=retrain)
        assert ('begun by other code' in capsys.readouterr().out)==(not retrain)
        assert list(st().run(cell('t', seed=int(retrain)), 'h').metrics().step)==steps
        assert st().run(cell('t', seed=int(retrain)), 'h').state()==('fresh' if retrain else 'stale')

def student_and_teacher(root):
    def fn(c, run):
        began = time.time()
        if c.mode=='standard': time.sleep(.5)
        return dict(began=began, ended=time.time())
    def teacher(c): return [] if c.mode=='standard' else [cell('t')]
    train_missing(grid(task='t', mode=['target','standard','hybrid']), fn, Store(root), 'h', after=teacher, poll=.05)

def test_student_waits_for_a_teacher_that_another_process_trains(tmp_path):
    finish(*(launch(student_and_teacher, tmp_path) for _ in range(2)))
    df = finished(tmp_path).set_index('mode')
    assert len(df)==3 and (df.began[['target','hybrid']]>=df.ended['standard']).all()

@pytest.mark.parametrize('change', ['return x+2','return y+1','return x-1','return None','return x+1.0','x += 1; return x+1'])
def test_fingerprint_sees_every_change_of_code(module, change):
    before = fingerprint(['toy_code'])
    module.write_text(module.read_text().replace('return x+1', change))
    assert fingerprint(['toy_code'])!=before

def test_fingerprint_tells_a_string_that_is_code_from_a_docstring(module):
    module.write_text('def f(x):\n    return "a"\n'); a = fingerprint(['toy_code'])
    module.write_text('def f(x):\n    return "b"\n')
    assert fingerprint(['toy_code'])!=a

def test_fingerprint_ignores_lists_that_only_newer_pythons_have():
    old,new = ast.parse('def f(): pass'),ast.parse('def f(): pass')
    new.body[0]._fields = (*new.body[0]._fields, 'new_in_a_later_python'); new.body[0].new_in_a_later_python = []
    assert normalised_ast(new)==normalised_ast(old)

# --- tables ---

def results(tmp_path, seeds, scale='demo', mode=('standard','target'), **kw):
    rng = np.random.default_rng(0)
    cells = grid(task='t', mode=list(mode), seed=list(seeds), scale=scale, **kw)
    return train_missing(cells, lambda c, run: dict(wer=10+c.seed/10+2*(c.mode=='target')), Store(tmp_path/'runs'), 'h')

def table(tmp_path, out, *a, force=False, **kw):
    df = results(tmp_path, *a, **kw)
    return write_table('t1', summarise(df, 'mode', 'task', 'wer'), df, tmp_path/out, force=force)

def test_interval_is_students():
    from scipy import stats
    x = [1.,2.,4.]
    assert np.allclose(mean_ci(x)[1:3], stats.ttest_1samp(x, 0).confidence_interval())
    one = mean_ci([3.])
    assert one.mean==3 and one.n==1 and np.isnan(one.low) and np.isnan(one.high)
    assert np.isnan(mean_ci([1., None, 2.]).mean), 'a failed seed must not vanish'

def test_smoke_never_reaches_paper_figures(tmp_path):
    with pytest.raises(ValueError, match='smoke'): table(tmp_path, 'paper_figures', [0], scale='smoke', force=True)
    assert not (tmp_path/'paper_figures').exists()
    assert len(table(tmp_path, 'other', [0], scale='smoke'))==3

@pytest.mark.parametrize('kw,why', [(dict(seeds=[0,1]), 'this one 2'), (dict(seeds=[0]), '3 seeds of t random softmax standard, this one 1'), (dict(seeds=[0,1,2], mode=['standard']), 'this one 0'),
                                    (dict(seeds=[0,1,2], lr=1), 'overridden'), (dict(seeds=[0,1,2], scale='paper'), 'scale')])
def test_a_lesser_result_replaces_nothing_unless_forced(tmp_path, capsys, kw, why):
    written = table(tmp_path, 'paper_figures', [0,1,2])
    old = [f.read_bytes() for f in written]
    kw = dict(kw); seeds = kw.pop('seeds')
    assert table(tmp_path, 'paper_figures', seeds, **kw)==[]
    out = capsys.readouterr().out
    assert 'paper_figures/t1 is kept' in out and why in out
    assert [f.read_bytes() for f in written]==old
    assert len(table(tmp_path, 'paper_figures', seeds, force=True, **kw))==3
    assert [f.read_bytes() for f in written]!=old

def test_as_many_seeds_replace(tmp_path, capsys):
    table(tmp_path, 'paper_figures', [0,1,2])
    assert len(table(tmp_path, 'paper_figures', [1,2,3,4]))==3 and not capsys.readouterr().out

def test_table_and_provenance_agree_and_repeat_byte_for_byte(tmp_path):
    first = {f.name:f.read_bytes() for f in table(tmp_path, 'a', [0,1,2])}
    assert first=={f.name:f.read_bytes() for f in table(tmp_path, 'a', [0,1,2])}
    prov = json.loads(first['t1.json'])
    assert prov['csv_sha256']==hashlib.sha256(first['t1.csv']).hexdigest()
    assert prov['seeds']==[0,1,2] and prov['scale']==['demo'] and prov['data']==['h'] and len(prov['runs'])==6
    for k in ('commit','dirty','parameters','environment','device','seconds','peak_memory_mb','code','trained'): assert k in prov

def test_provenance_is_null_where_git_is_absent(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert git_state()==dict(commit=None, dirty=None)

def test_provenance_names_no_folder_of_this_machine(tmp_path):
    df = results(tmp_path, [0])
    prov = provenance(df, params=dict(data=str(tmp_path/'mine.tsv'), both=[str(tmp_path/'a')], steps=3))
    assert prov['parameters']==dict(data='mine.tsv', both=['a'], steps=3)
    assert str(tmp_path) not in json.dumps(prov)

def test_figures_are_the_same_bytes(tmp_path):
    import matplotlib; matplotlib.use('agg')
    import matplotlib.pyplot as plt
    df,seen = results(tmp_path, [0]),[]
    for _ in range(2):
        fig,ax = plt.subplots(figsize=(5,3)); ax.plot(df.wer); ax.set_title('$x^2$')
        seen.append({f.name:f.read_bytes() for f in write_figure('f1', fig, df[['mode','wer']], df, tmp_path/'out')})
        plt.close(fig); time.sleep(1.1) # a time stamp of whole seconds would differ
    assert seen[0]==seen[1] and sorted(seen[0])==['f1.csv','f1.json','f1.pdf','f1.png']

def test_comparison_says_in_which_interval_a_number_lies(tmp_path):
    df = pd.DataFrame(dict(mode=list('abcd'), wer=0.)).merge(pd.DataFrame(dict(seed=range(3))), 'cross')
    df.loc[df['mode']!='d', 'wer'] = np.tile([9.,10.,11.], 3)
    csv = summarise(df, 'mode', None, 'wer'); (tmp_path/'t.csv').write_text(csv.to_csv(index=False))
    new = pd.DataFrame(dict(mode=list('abcde'), wer=[12., 14., 16., 0., 1.]))
    got = compare_with_committed('t', summarise(new, 'mode', None, 'wer'), tmp_path)
    assert list(got.verdict)==['in the interval of the mean', 'in the prediction interval', 'outside both', 'in the interval of the mean', 'no interval']
    from scipy import stats
    assert np.isclose(got.prediction[0], stats.t.ppf(.975, 2)*1*(1+1/3)**.5)
    with pytest.raises(FileNotFoundError, match='no committed result'): compare_with_committed('none', new, tmp_path)

def test_prediction_interval_holds_95_percent():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        old,new = rng.normal(size=3),rng.normal()
        i = mean_ci(old); half = (i.high-i.mean)*(1+3/1)**.5
        hits += abs(new-i.mean)<=half
    assert .92<=hits/400<=.98

# --- papermill parameters ---

opening = """from cald.lab.queue import *
from typing import Optional
before = dict(globals())"""
parameters = """steps:int = 3 # steps
lr:float = None # rate
seeds:list[int] = [0] # seeds
name:str = 'a' # a name
flag:bool = False # a flag"""

def namespace(injected):
    "What a kernel's globals hold after papermill injected the lines `injected`"
    ns = {'__annotations__':{}}
    exec(opening, ns); exec(parameters, ns); exec(injected, ns)
    return ns

@pytest.mark.parametrize('injected', ['', 'steps = 4', 'lr = 1', 'lr = 0.5', 'seeds = [1, 2]', 'flag = True', "name = ''"])
def test_good_parameters_pass(injected):
    ns = namespace(injected)
    assert check_parameters(ns, ns['before'])=={k:ns[k] for k in ('steps','lr','seeds','name','flag')}

@pytest.mark.parametrize('injected,message', [('stepz = 4', "'stepz': did you mean 'steps'"), ('Cell = 3', "unknown parameter 'Cell'"), ('steps = 3.5', 'steps must be int'),
    ('steps = True', 'steps must be int'), ("lr = '1e-3x'", 'lr must be float'), ("seeds = '[0]'", 'papermill -y'), ("seeds = ['a']", 'seeds must be list'),
    ('flag = 1', 'flag must be bool'), ('name = 3', 'name must be str')])
def test_bad_parameters_stop(injected, message):
    ns = namespace(injected)
    with pytest.raises(ValueError, match=re.escape(message)): check_parameters(ns, ns['before'])

@pytest.mark.parametrize('name,value,problem', [
    ('scale', 'tiny', 'known are smoke, demo, paper'), ('seeds', [], 'give at least one'),
    ('seeds', [0,0], 'different ones'), ('seeds', [-1], 'from 0 on'), ('steps', -5, 'cannot be negative'),
    ('lr', -1., 'cannot be negative'), ('train_rows', -2, 'cannot be negative'),
    ('out', 'file/out', 'cannot write to'), ('train_rows', -1, ''), ('scale', 'demo', ''),
    ('seeds', [2,0], ''), ('out', 'new/out', ''), ('out', '', '')])
def test_impossible_values_of_a_parameter_stop(tmp_path, monkeypatch, name, value, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'file').touch()
    ns = {'__annotations__':{name:type(value)}, name:value}
    if not problem:
        assert check_parameters(ns, {})=={name:value}
        return
    with pytest.raises(ValueError, match=f'parameter {name} is .*{problem}'): check_parameters(ns, {})

def test_a_row_with_another_name_does_not_replace_a_result(tmp_path):
    df = results(tmp_path, [0,1,2])
    renamed = provenance(df.assign(row=df['mode']+', again'))
    assert 'standard, again' in reason_to_keep(renamed, provenance(df))
    assert reason_to_keep(renamed, renamed) is None
    other = {**renamed, 'overrides':[['k',4]]}
    assert 'overridden' in reason_to_keep(other, {**renamed, 'overrides':[['lr',1]]})

# --- the rest ---

def test_numbers_of_the_paper_have_a_source_or_are_empty():
    df = paper_numbers()
    assert list(df.columns)==['table','row','column','value','unit','source']
    assert (df.source[df.value.isna()]=='unknown').all() and (df.source[df.value.notna()]!='unknown').all()
    assert not df.duplicated(['table','row','column']).any()
    t3 = paper_numbers('Table 3').pivot(index='row', columns='column', values='value')
    assert t3.shape==(5,3) and t3.isna().sum().sum()==9
    with pytest.raises(ValueError, match="did you mean 'Table 3'"): paper_numbers('Tabel 3')

def test_readme_writer(tmp_path):
    import nbformat.v4 as v4
    (tmp_path/'nbs').mkdir()
    out = [v4.new_output('stream', text='hello\n'), v4.new_output('display_data', {'text/plain':'<Figure>','image/png':'aGk='}),
           v4.new_output('execute_result', {'text/markdown':'| a |','text/plain':'x'})]
    cells = [v4.new_markdown_cell('# T\n\n[a](05_speech.ipynb) ![f](../paper_figures/f.png) [u](https://x.y/z) [s](#part)'),
             v4.new_code_cell('#| hide\nsecret'), v4.new_code_cell('1+1', outputs=out)]
    (tmp_path/'nbs/index.ipynb').write_text(json.dumps(v4.new_notebook(cells=cells)))
    write_markdown(tmp_path/'nbs/index.ipynb', tmp_path/'README.md')
    text = (tmp_path/'README.md').read_text()
    assert '[a](nbs/05_speech.ipynb) ![f](paper_figures/f.png) [u](https://x.y/z) [s](#part)' in text
    assert '```python\n1+1\n```' in text and '```\nhello\n```' in text and '| a |' in text and 'secret' not in text and '<Figure>' not in text

def test_folders(tmp_path, monkeypatch):
    for v in ('CALD_OUT','CALD_RUNS','CALD_CACHE'): monkeypatch.delenv(v, raising=False)
    monkeypatch.chdir(root/'nbs')
    assert out_folder()==root/'paper_figures' and out_folder('', 'smoke')==root/'runs'/'smoke' and out_folder('runs/demo')==root/'nbs'/'runs'/'demo'
    assert runs_folder()==root/'runs' and cache_folder()==root/'runs'/'cache' and out_folder(str(tmp_path))==tmp_path
    monkeypatch.setenv('CALD_OUT', str(tmp_path/'o')); monkeypatch.setenv('CALD_RUNS', str(tmp_path/'r'))
    assert out_folder()==tmp_path/'o' and cache_folder()==tmp_path/'r'/'cache'

def test_hash_of_files_sees_names_and_bytes(tmp_path):
    (tmp_path/'d').mkdir(); (tmp_path/'d/a').write_text('1'); (tmp_path/'d/b').write_text('2')
    h = hash_files(tmp_path/'d'); seen = {h}
    (tmp_path/'d/a').write_text('3'); seen.add(hash_files(tmp_path/'d'))
    (tmp_path/'d/a').rename(tmp_path/'d/c'); seen.add(hash_files(tmp_path/'d'))
    assert len(seen)==3
    with pytest.raises(FileNotFoundError, match='nothing'): hash_files(tmp_path/'nothing')
