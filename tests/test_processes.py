"""Two processes train one model: their objective is that of one process with the micro-batches of both, and a signal that one of
them gets ends both. They train a grid with the batches of one process, and one of them writes. The processes are forked from this one
and use gloo."""
import json, os, signal, socket, sys, time, traceback
from dataclasses import asdict
from pathlib import Path

import pytest, torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from transformers import (AutoModelForSequenceClassification,RobertaConfig,RobertaForMaskedLM,RobertaForSequenceClassification,
                          TrainerCallback,TrainingArguments)

from cald.align import Alignment
from cald.convert import convert
from cald.distill import Distiller
from cald.guidance import Target,Trajectory
from cald.lab.experiment import Experiment,Task
from cald.lab.grid import scale_settings
from cald.lab.queue import first_one_first
from cald.lab.recipe import Recipe,share_of_batch
from cald.lab.store import Store
from cald.training.batches import BoundedBatches
from cald.training.loop import content_hash
from cald.losses import loss_preset
from cald.resume import last_checkpoint
from test_distill import speech,utterances

SIZE = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, max_position_embeddings=24,
            pad_token_id=1, hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
QUIET = dict(layerdrop=0., hidden_dropout=0., attention_dropout=0., activation_dropout=0., feat_proj_dropout=0., final_dropout=0.,
             apply_spec_augment=False)

def roberta(seed, cls=RobertaForSequenceClassification, **kw):
    torch.manual_seed(seed)
    return cls(RobertaConfig(**{**SIZE, **kw}))

def sentences(n=16):
    "Of 3 to 18 tokens, so that micro-batches have unlike numbers of them"
    g = torch.Generator().manual_seed(0)
    return [dict(input_ids=torch.randint(3, 20, (int(torch.randint(3, 19, (1,), generator=g)),), generator=g), labels=i%2) for i in range(n)]

def pad(rows):
    n = max(len(r['input_ids']) for r in rows)
    ids = torch.stack([F.pad(r['input_ids'], (0, n-len(r['input_ids'])), value=1) for r in rows])
    return dict(input_ids=ids, attention_mask=(ids!=1).long(), labels=torch.tensor([r['labels'] for r in rows]))

def pad_masked(rows):
    "Labels at the tokens alone"
    batch = pad(rows)
    return dict(batch, labels=batch['input_ids'].masked_fill(batch['attention_mask']==0, -100))

def pad_audio(rows):
    "Without the noise of test_distill"
    n,m = (max(len(r[k]) for r in rows) for k in ('input_values','labels'))
    return dict(input_values=torch.stack([F.pad(r['input_values'], (0, n-len(r['input_values']))) for r in rows]),
                attention_mask=torch.stack([(torch.arange(n)<len(r['input_values'])).long() for r in rows]),
                labels=torch.stack([F.pad(r['labels'], (0, m-len(r['labels'])), value=-100) for r in rows]))

KINDS = ['classes','tokens','characters','trajectory','tokens, trajectory','bounded']

class OfTwo(BoundedBatches):
    "One process gets the parts of two"
    def share(self, part, parts):
        self.whole = parts==1
        super().share(part, 2)
    def __iter__(self):
        if not self.whole: return super().__iter__()
        shares = []
        for self.part in (0,1): shares.append(list(super().__iter__()))
        return (a+b for a,b in zip(*shares, strict=True))

def make(kind, folder, size, steps=2, **kw):
    "A run of gradient descent, whose weights after each step are the sum of its gradients"
    args = TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=size, gradient_accumulation_steps=2, optim='sgd',
                             learning_rate=.1, warmup_steps=0, lr_scheduler_type='constant', max_grad_norm=0., logging_steps=1,
                             use_cpu=True, report_to='none', **{'save_strategy':'no', **kw})
    task_sum = kind=='characters'
    tokens = kind.startswith('tokens')
    if tokens:
        models = [roberta(s, RobertaForMaskedLM) for s in (0,1)]
        taught = Trajectory(models[1], lr=1e-2, warmup=0) if kind!='tokens' else Target(models[1], loss_preset(alpha_output=1.))
        parts = pad_masked,taught
    elif kind=='characters': parts = pad_audio,Target(speech(3, **QUIET), loss_preset('paper-speech'))
    elif kind=='trajectory': parts = pad,Trajectory(roberta(1), lr=1e-2, warmup=0)
    else: parts = pad,Target(roberta(1))
    model = speech(0, **QUIET) if task_sum else models[0] if tokens else roberta(0)
    data = utterances(16) if task_sum else sentences()
    batches = OfTwo([len(r['input_ids']) for r in data], size=4, limit=40) if kind=='bounded' else None
    return Distiller(model, args, data, parts[1], data_collator=parts[0], task_sum=task_sum, progress='none', batches=batches)

def summary(d):
    "What the run has logged, and its weights by name"
    logs = [{k: v for k,v in l.items() if 'loss' in k} for l in d.state.log_history]
    return dict(logs=logs, weights={n: p.tolist() for n,p in d.model.named_parameters()})

def launch(work, *args, seconds=240)->list:
    "The exit codes of two forked processes of one launch, each of which does work(rank, *args)"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(2):
        sys.stdout.flush()
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            torch.set_num_threads(1)
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2', RANK=str(rank), LOCAL_RANK=str(rank),
                              GLOO_SOCKET_IFNAME='lo')
            work(rank, *args)
            torch.distributed.destroy_process_group()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    codes = {}
    end = time.monotonic()+seconds
    while len(codes)<2 and time.monotonic()<end:
        for pid in set(pids)-codes.keys():
            done,status = os.waitpid(pid, os.WNOHANG)
            if done: codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(.01)
    for pid in set(pids)-codes.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [codes.get(pid, 'hangs') for pid in pids]

def train_kinds(rank, folder):
    for kind in KINDS:
        d = make(kind, folder/kind, 2)
        d.train()
        assert d.args.world_size==2
        if rank==0: (folder/f'{kind}.json').write_text(json.dumps(summary(d)))

@pytest.fixture(scope='module')
def of_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    assert launch(train_kinds, folder)==[0,0]
    return folder

@pytest.mark.parametrize('kind', KINDS)
def test_two_processes_have_the_objective_of_one(kind, of_two, tmp_path):
    two = json.loads((of_two/f'{kind}.json').read_text())
    d = make(kind, tmp_path, 4)
    d.train()
    one = summary(d)
    for a,b in zip(one['logs'], two['logs'], strict=True): assert a==pytest.approx(b, rel=1e-5)
    start = dict(make(kind, tmp_path, 4).model.named_parameters())
    for name,p in one['weights'].items():
        moved = (torch.tensor(p)-start[name].detach()).abs().max().item()
        torch.testing.assert_close(torch.tensor(p), torch.tensor(two['weights'][name]), rtol=0, atol=1e-4*moved+1e-7, msg=name)

class Signals(TrainerCallback):
    "Sends this process `signals`, a dict from step to signal"
    def __init__(self, signals): self.signals = signals
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.signals: os.kill(os.getpid(), self.signals[state.global_step])

def train_with_signals(rank, folder, signals):
    "Train until the end or a signal; one process has written what it knows"
    d = make('trajectory', folder/'run', 2, steps=6, save_strategy='steps', save_steps=4)
    d.add_callback(Signals(signals.get(rank, {})))
    stopped = False
    try: d.train(resume=True)
    except KeyboardInterrupt: stopped = True
    result = dict(step=d.state.global_step, stopped=stopped, weights=content_hash(d.model.state_dict()),
                  teacher=content_hash(d.guidance.teacher.state_dict()), logs=summary(d)['logs'])
    (folder/f'{rank}.json').write_text(json.dumps(result))

def test_a_signal_to_one_process_stops_both_and_the_run_resumes(tmp_path):
    "One process gets SIGTERM in its third step, the other one SIGINT in the fourth, which it never makes"
    def run(name, signals):
        folder = tmp_path/name
        folder.mkdir(exist_ok=True)
        assert launch(train_with_signals, folder, signals)==[0,0]
        return [json.loads((folder/f'{rank}.json').read_text()) for rank in (0,1)]
    cut = run('cut', {0: {3: signal.SIGINT}, 1: {2: signal.SIGTERM}})
    assert [r['step'] for r in cut]==[3,3] and all(r['stopped'] for r in cut)
    assert last_checkpoint(tmp_path/'cut'/'run').name=='checkpoint-3'
    again,straight = run('cut', {}),run('straight', {})
    assert [r['step'] for r in again]==[6,6] and not any(r['stopped'] for r in again)
    for name in ('weights','teacher'): assert len({r[name] for r in again+straight})==1
    for a,b in zip(again[0]['logs'], straight[0]['logs'], strict=True): assert a==pytest.approx(b, rel=1e-6)

# --- a grid ---

class Grid(Experiment):
    "A standard model and a student that is aligned first, without dropout; an epoch has a whole number of batches"
    tasks = dict(odd=Task('odd', 'odd', 'error', False))
    rows = {'standard':{}, 'target, aligned':dict(mode='target', start='attention', aligned=True, rates='two')}
    mixer = 'linformer'
    modules = ['cald.lab.experiment']
    record = 2
    def read(self, **kwargs): return dict(odd=GridData)
    def part(self, data, task, split): return sentences()
    def labels(self, data, task): return 2
    def source(self, c, r, labels): return roberta(c.seed)
    def load(self, folder): return AutoModelForSequenceClassification.from_pretrained(folder)
    def mixer_args(self, mixer, r): return dict(k=4)
    def collate(self, items): return pad(items)
    @torch.no_grad()
    def judge(self, model, ds): return dict(error=model.eval()(**pad(ds)).loss.item())

class GridData:
    hash = 'sentences'

scale_settings('odd', smoke=asdict(Recipe(steps=5, batch=8, lr=1e-2, lr_student=1e-2, alpha=1., evals=2, align=3)))
GRID = dict(tasks=['odd'], modes=['target, aligned'], seeds=[0], source='random', scale='smoke')

def train_grid(rank, root, **changes):
    store = Store(root, Grid.modules)
    rows = Grid().train({}, GRID|changes, dict(odd=GridData), store, workers=2)
    assert len(rows)==2 and rows.error.notna().all()

@pytest.fixture(scope='module')
def grids(tmp_path_factory):
    "The same grid by two processes and by one"
    folder = tmp_path_factory.mktemp('grids')
    assert launch(train_grid, folder/'two')==[0,0]
    train_grid(0, folder/'one')
    return folder

def runs_of(root): return sorted(Store(root).runs(), key=lambda r: r.cell.mode)

def test_a_grid_of_two_processes_has_the_batches_and_the_results_of_one(grids):
    for one,two in zip(runs_of(grids/'one'), runs_of(grids/'two'), strict=True):
        assert one.key==two.key and one.result==pytest.approx(two.result, rel=1e-4)
        a,b = (r.metrics().drop(columns=['seconds']) for r in (one,two))
        assert list(a.step)==list(b.step) and list(a)==list(b)
        for name in a: assert list(a[name])==pytest.approx(list(b[name]), rel=1e-3, abs=1e-6, nan_ok=True), name
        x,y = (Grid().load(r.folder/'model').eval()(**pad(sentences())).logits for r in (one,two))
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)

def test_one_of_two_processes_writes_and_the_record_has_their_number(grids):
    for run in runs_of(grids/'two'):
        assert len(run.sessions)==1 and run.sessions[0]['device'].endswith(', 2 processes')
        assert not run.metrics().duplicated(['step','eval_error']).any()
    assert not runs_of(grids/'one')[0].sessions[0]['device'].endswith('processes')
    progress = (grids/'two'/'progress.log').read_text().splitlines()
    assert [line.split()[0] for line in progress if 'to do' in line]==['2','1'] and not list((grids/'two').glob('helper-*'))

def test_a_notebook_finds_the_runs_of_a_launch_done(grids, monkeypatch):
    monkeypatch.setattr(Experiment, 'train_cell', lambda *args: pytest.fail('this was trained already'))
    train_grid(0, grids/'two')

@pytest.fixture
def modules_of_tests(monkeypatch):
    here = Path(__file__).parent
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(here.parent), str(here)]))

def test_the_command_of_a_launch_trains_the_grid_of_a_notebook(grids, modules_of_tests, monkeypatch, tmp_path):
    monkeypatch.setenv('CALD_LAUNCH', f'{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2')
    train_grid(0, tmp_path)
    for run,same in zip(runs_of(tmp_path), runs_of(grids/'two'), strict=True):
        assert run.result==same.result and run.sessions[0]['device'].endswith(', 2 processes')

def test_a_launch_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('CALD_LAUNCH', 'false')
    with pytest.raises(RuntimeError, match='false ended with status 1: see .*launch.log'): train_grid(0, tmp_path)

def wait_in_turn(rank, folder):
    with first_one_first():
        if rank==0: time.sleep(.3)
        else: assert (folder/'cache').exists()
        (folder/'cache').touch()

def test_the_first_process_reads_first(tmp_path): assert launch(wait_in_turn, tmp_path)==[0,0]

def test_a_batch_that_the_processes_do_not_divide_is_an_error():
    assert share_of_batch(8, 2)==4
    with pytest.raises(ValueError, match='batch of 8 cannot be divided among 3 processes'): share_of_batch(8, 3)
