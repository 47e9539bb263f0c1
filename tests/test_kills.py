"""Runs that are killed (SIGKILL) at points drawn by a seed, half of them while files are written: resumed, they end with the
weights and the metrics of an uninterrupted run. Each run is a child that is forked from this process."""
import json, mmap, os, random, shutil, signal, struct, sys, time, traceback
from dataclasses import asdict
from pathlib import Path

import pandas as pd, psutil, pytest, torch
from transformers import (AutoModelForSequenceClassification,RobertaConfig,RobertaForSequenceClassification,TrainerCallback,
                          TrainingArguments)

from cald.align import Alignment
from cald.convert import convert
from cald.distill import Distiller,find_snapshots
from cald.guidance import Hybrid,Target,Trajectory,Unguided,Waypoint
from cald.lab.experiment import Experiment,Task
from cald.lab.grid import scale_settings
from cald.lab.recipe import Recipe
from cald.lab.store import Store
from cald.paper.reproduce import reproduce
from cald.paper.status import Artefact
from cald.training.loop import content_hash
from cald.resume import last_checkpoint

pytestmark = pytest.mark.faults
KILLS = 6 # of each kind of run
STEPS = 6

def roberta(seed):
    "One layer, with dropout"
    torch.manual_seed(seed)
    size = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    return RobertaForSequenceClassification(RobertaConfig(**size, max_position_embeddings=16, pad_token_id=1))

def sentences(n):
    g = torch.Generator().manual_seed(n)
    return [dict(input_ids=torch.randint(4, 20, (8,), generator=g), labels=i%2) for i in range(n)]

def collate(rows):
    "A batch with one token in five replaced"
    ids = torch.stack([r['input_ids'] for r in rows])
    ids = ids.masked_fill(torch.rand(ids.shape)<.2, 3)
    return dict(input_ids=ids, labels=torch.tensor([r['labels'] for r in rows]))

def trajectory(): return Trajectory(roberta(4), lr=1e-3, every=2, warmup=1)

GUIDANCE = dict(unguided=lambda s: Unguided(), target=lambda s: Target(roberta(3), train_mode=True),
                trajectory=lambda s: trajectory(), waypoint=lambda s: Waypoint(s),
                hybrid_target=lambda s: Hybrid(Target(roberta(3)), until=3),
                hybrid_trajectory=lambda s: Hybrid(trajectory(), until=.7),
                hybrid_waypoint=lambda s: Hybrid(Waypoint(s), until=4),
                hybrid_unguided=lambda s: Hybrid(Unguided(), until=2), aligned=lambda s: Target(roberta(3)))
# evaluation, and a checkpoint after every step if True
WHEN = dict(unguided=('steps',False), target=('epoch',False), trajectory=('steps',False), waypoint=('epoch',True),
            hybrid_target=('steps',True), hybrid_trajectory=('epoch',False), hybrid_waypoint=('steps',False),
            hybrid_unguided=('epoch',True), aligned=('steps',False))

def make(mode, folder, snapshots):
    "Three steps of two micro-batches are an epoch"
    unit,always = WHEN[mode]
    args = TrainingArguments(str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                             learning_rate=1e-2, warmup_steps=2, logging_steps=2, eval_strategy=unit, save_strategy=unit,
                             eval_steps=2, save_steps=2, save_total_limit=1, load_best_model_at_end=True, use_cpu=True,
                             report_to='none')
    aligned = dict(align=Alignment(roberta(3), 3, calibration=2), lr_new=2e-2) if mode=='aligned' else {}
    seed = 99 if last_checkpoint(folder) else 0 # a checkpoint replaces the initial weights
    model = convert(roberta(0), to='linformer', k=4, seed=0) if aligned else roberta(seed)
    return Distiller(model, args, sentences(12), GUIDANCE[mode](snapshots), data_collator=collate, progress='none',
                     eval_dataset=sentences(4), save_minutes=0 if always else 15, **aligned)

class Killer(TrainerCallback):
    """Counts the events of a run: points of the loop, and operations on files below `folder`; ends the process at event
    `at` of `kind`. `memory`, shared with the parent, has both counts and the step"""
    def __init__(self, folder, memory, kind=None, at=0):
        self.folder,self.memory,self.kind,self.at = str(folder),memory,kind,at
        self.counts,self.step = dict(loop=0, file=0),0
        sys.addaudithook(self.audit)
        for point in ('step_begin','substep_end','pre_optimizer_step','step_end','evaluate','log','save','epoch_end'):
            setattr(self, f'on_{point}', self.reach)
    def count(self, kind):
        self.counts[kind] += 1
        self.memory[:12] = struct.pack('3i', *self.counts.values(), self.step)
        if kind==self.kind and self.counts[kind]==self.at: os.kill(os.getpid(), signal.SIGKILL)
    def reach(self, args, state, control, **kwargs):
        self.step = state.global_step
        self.count('loop')
    def audit(self, event, args):
        if event not in ('open','os.rename','os.remove','os.mkdir','os.rmdir'): return
        reads = event=='open' and not args[2]&(os.O_WRONLY|os.O_RDWR)
        if not reads and os.fsdecode(args[0] if isinstance(args[0], (str,bytes,os.PathLike)) else '').startswith(self.folder):
            self.count('file')

def forked(work, *args)->int:
    "Run work(*args) in a forked child; its exit code, or minus the number of the signal that killed it"
    sys.stdout.flush()
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        torch.set_num_threads(1)
        work(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def train(mode, folder, snapshots, memory, kind=None, at=0):
    "Begin or resume the run in `folder`; at its end write hashes of the weights, and all logs without times"
    d = make(mode, folder/'run', snapshots)
    d.add_callback(Killer(folder/'run', memory, kind, at))
    d.train(resume=True)
    times = ('_runtime','_per_second','total_flos')
    logs = [{k: v for k,v in log.items() if not k.endswith(times)} for log in d.state.log_history]
    errors = d.alignment_errors.to_dict('list') if mode=='aligned' else None
    result = dict(weights=content_hash(d.model.state_dict()), logs=logs, best=d.state.best_global_step, errors=errors,
                  teacher=d.guidance.teacher and content_hash(d.guidance.teacher.state_dict()),
                  checkpoints=sorted(p.name for p in (folder/'run').glob('checkpoint-*')))
    (folder/'end.json').write_text(json.dumps(result))

def last_step(folder):
    newest = last_checkpoint(folder)
    return int(newest.name.split('-')[1]) if newest else 0

@pytest.fixture(scope='module')
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp('waypoints')
    for s in (2,4,9): roberta(s).save_pretrained(folder/f'snapshot-{s}')
    return find_snapshots(folder)

@pytest.mark.parametrize('mode', GUIDANCE)
def test_killed_runs_end_as_uninterrupted_ones(mode, snapshots, tmp_path, record_property):
    memory = mmap.mmap(-1, 12)
    for name in ('straight','cut'): (tmp_path/name).mkdir()
    assert forked(train, mode, tmp_path/'straight', snapshots, memory)==0
    straight = json.loads((tmp_path/'straight'/'end.json').read_text())
    events = dict(zip(('loop','file'), struct.unpack('3i', memory[:12])))
    cut = tmp_path/'cut'
    draw = random.Random(mode)
    kills = lost = 0
    while kills<KILLS:
        kind = ('loop','file')[kills%2]
        left = 1-last_step(cut/'run')/STEPS
        code = forked(train, mode, cut, snapshots, memory, kind, draw.randint(1, max(int(events[kind]*left), 1)))
        assert code in (0,-signal.SIGKILL)
        if code==0: shutil.rmtree(cut/'run') # it ended before the point was reached: from the beginning
        else:
            kills += 1
            lost += struct.unpack('3i', memory[:12])[2]-last_step(cut/'run')
    assert forked(train, mode, cut, snapshots, memory)==0
    assert json.loads((cut/'end.json').read_text())==straight
    record_property('kills', kills)
    record_property('steps lost', lost)

# a whole `cald reproduce`, whose kernel is another process

GRID_CELL = """from cald.lab.results import write_table
from cald.lab.store import out_folder,Store
from test_kills import Table,TableData
experiment = Table()
grid = dict(tasks=['kill'], modes=['target'], seeds=seeds, source='random', scale=scale)
results = experiment.train({}, grid, experiment.read(), Store(None, experiment.modules))
write_table('killed', experiment.table(results), results, out_folder(out, scale), params=dict(scale=scale), force=True)"""

class TableData:
    hash = 'sentences'

class Table(Experiment):
    "A standard model and its student, with dropout and random inputs"
    tasks = dict(kill=Task('kill', 'kill', 'error', False))
    modules = ['cald.lab.experiment']
    metrics = dict(error='error')
    mixer = 'linformer'
    def read(self, **kwargs): return dict(kill=TableData)
    def part(self, data, task, split): return sentences(24)
    def labels(self, data, task): return 2
    def source(self, c, r, labels): return roberta(c.seed)
    def load(self, folder): return AutoModelForSequenceClassification.from_pretrained(folder)
    def mixer_args(self, mixer, r): return dict(k=4)
    def collate(self, items): return collate(items)
    @torch.no_grad()
    def judge(self, model, ds):
        training = model.training
        inputs = {k: torch.stack([torch.as_tensor(o[k]) for o in ds]) for k in ('input_ids','labels')}
        error = model.eval()(**inputs).loss.item()
        model.train(training)
        return dict(error=error)

scale_settings('kill', smoke=asdict(Recipe(steps=60, batch=4, lr=1e-2, lr_student=1e-2, alpha=1., evals=12)))

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with the notebook of one table"
    source = "scale:str = 'demo'\nseeds:list[int] = [0]\nout:str = ''"
    code = [dict(cell_type='code', id=f'c{i}', source=s, metadata=dict(tags=t), outputs=[], execution_count=None)
            for i,(s,t) in enumerate([(source, ['parameters']), (GRID_CELL, [])])]
    (tmp_path/'nbs').mkdir()
    (tmp_path/'settings.ini').write_text('lib_name = cald\n')
    meta = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    (tmp_path/'nbs'/'killed.ipynb').write_text(json.dumps(dict(cells=code, metadata=meta, nbformat=4, nbformat_minor=5)))
    monkeypatch.chdir(tmp_path)
    for k in ('CALD_RUNS','CALD_OUT'): monkeypatch.delenv(k, raising=False)
    tests = Path(__file__).parent
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tests.parent), str(tests)]))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    return tmp_path

def make_table(): reproduce(scale='smoke', artefacts=[Artefact('killed', 'Killed', 'killed')])

def checkpoint_of(mode, folder):
    "The last checkpoint of the run of `mode`, 0 without one"
    return max((int(p.parent.name.split('-')[1]) for p in (folder/'runs').glob(f'*-{mode}-*/train/checkpoint-*/complete.json')), default=0)

def kill_reproduce(folder, mode):
    "Start `cald reproduce`; kill it and its kernel once the run of `mode` has a checkpoint; the step of that checkpoint"
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try: make_table()
        finally: os._exit(1)
    end = time.monotonic()+300
    while not checkpoint_of(mode, folder):
        assert os.waitpid(pid, os.WNOHANG)[0]==0 and time.monotonic()<end, 'it ended before the run began'
        time.sleep(.005)
    kernels = psutil.Process(pid).children(recursive=True)
    assert kernels
    for each in kernels: each.kill()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    psutil.wait_procs(kernels, 30)
    assert not list((folder/'runs').glob(f'*-{mode}-*/result.json'))
    return checkpoint_of(mode, folder)

def test_a_killed_reproduce_ends_with_the_results_of_an_uninterrupted_one(project, record_property):
    for mode in ('standard','target'): assert kill_reproduce(project, mode)<60
    make_table()
    table = Table()
    grid = dict(tasks=['kill'], modes=['target'], seeds=[0], source='random', scale='smoke')
    straight = Store(project/'straight')
    results = table.train({}, grid, table.read(), straight)
    for run in straight.runs():
        cut, = [r for r in Store(project/'runs').runs() if r.key==run.key]
        assert len(cut.sessions)>1 and cut.result==run.result
        a,b = (table.load(r.folder/'model').state_dict() for r in (run,cut))
        assert all(torch.equal(a[n], b[n]) for n in a)
        logs = [r.metrics().drop(columns=['seconds','session']) for r in (run,cut)]
        assert logs[0].equals(logs[1])
    shown = pd.read_csv(project/'runs'/'smoke'/'killed.csv')
    assert shown['mean'].tolist()==pytest.approx(table.table(results)['mean'].tolist(), rel=1e-5)
    record_property('kills', 2)
