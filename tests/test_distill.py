"The training loop: a resumed run is the uninterrupted one, bit for bit; broken checkpoints; what is run, logged and decayed."
import copy, functools, json, os, pickle, random, shutil, signal
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (GPTNeoXConfig, GPTNeoXForCausalLM, RobertaConfig, RobertaForSequenceClassification, TrainerCallback, TrainingArguments,
                          Wav2Vec2Config, Wav2Vec2ForCTC)

from cald.convert import convert
from cald.distill import Distiller,find_snapshots,seed_all
from cald.guidance import Hybrid,load_snapshot,Target,Trajectory,Unguided,Waypoint
from cald.losses import loss_preset
from cald.resume import (checkpoint_problem,EpochSampler,last_checkpoint,list_checkpoints,MANIFEST,
                         SeededBatches,write_checkpoint_manifest)


def speech(seed=0, **kw):
    "A tiny Wav2Vec2 with all that is random in one: dropout, SpecAugment, LayerDrop"
    torch.manual_seed(seed)
    return Wav2Vec2ForCTC(Wav2Vec2Config(**{**dict(vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, conv_dim=(8,8), conv_stride=(5,4), conv_kernel=(10,4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, feat_extract_norm='layer',
        layerdrop=0.1, mask_time_prob=0.3, mask_time_length=2, pad_token_id=0), **kw}))

def utterances(n=11):
    g = torch.Generator().manual_seed(0)
    def size(a, b): return int(torch.randint(a, b, (1,), generator=g))
    return [dict(input_values=torch.randn(size(300, 600), generator=g), labels=torch.randint(1, 12, (size(2, 5),), generator=g))
            for _ in range(n)]

def collate(rows):
    "Pad, and add noise from all three generators"
    noise = (torch.rand(1).item()+np.random.rand()+random.random())*0.1
    n,m = (max(len(r[k]) for r in rows) for k in ('input_values','labels'))
    return dict(input_values=torch.stack([F.pad(r['input_values'], (0,n-len(r['input_values'])))+noise for r in rows]),
                attention_mask=torch.stack([(torch.arange(n)<len(r['input_values'])).long() for r in rows]),
                labels=torch.stack([F.pad(r['labels'], (0,m-len(r['labels'])), value=-100) for r in rows]))

def settings(folder, **kw):
    "Three steps of two micro-batches in an epoch of 11 utterances (the last micro-batch has one), eight steps in all"
    return TrainingArguments(output_dir=str(folder), **{**dict(max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, warmup_steps=2, save_strategy='no', logging_steps=2, use_cpu=True, seed=1), **kw})

def distiller(folder, guidance=None, model=None, data=None, seed=0, **kw):
    own = {k: kw.pop(k) for k in list(kw) if k in ('snapshots','nonfinite','task_loss','task_sum','eval_dataset','callbacks','changed','save_minutes','lr_new','align','batches')}
    return Distiller(model or speech(seed), settings(folder, **kw), utterances() if data is None else data, guidance, data_collator=collate,
                     progress='none', **own)

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# resuming -----------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp('waypoints')
    for s in (2,5,9): speech(s).save_pretrained(folder/f'snapshot-{s}')
    return find_snapshots(folder)

MODES = dict(unguided=lambda s: Unguided(), target=lambda s: Target(speech(3), train_mode=True),
             trajectory=lambda s: Trajectory(speech(4), lr=1e-3, every=2, warmup=1), waypoint=lambda s: Waypoint(s),
             hybrid=lambda s: Hybrid(Target(speech(3)), until=5),
             hybrid_trajectory=lambda s: Hybrid(Trajectory(speech(4), lr=1e-3), until=0.75))

@pytest.mark.parametrize('mode', MODES)
def test_a_resumed_run_is_the_uninterrupted_one(mode, snapshots, tmp_path):
    straight = distiller(tmp_path/'straight', MODES[mode](snapshots))
    straight.train()
    stopped = distiller(tmp_path/'stopped', MODES[mode](snapshots), save_strategy='steps', save_steps=4)
    stopped.train()
    shutil.rmtree(tmp_path/'stopped'/'checkpoint-8')
    seed_all(99) # a new process: other objects, other weights, other generators
    resumed = distiller(tmp_path/'stopped', MODES[mode](snapshots), seed=7, save_strategy='steps', save_steps=4)
    torch.rand(13); np.random.rand(5)
    resumed.train(resume=True)
    assert resumed.state.global_step==8 and not same(speech(), straight.model)
    assert same(straight.model, stopped.model) # saving changes nothing
    assert same(straight.model, resumed.model)
    a,b = ([{k: v for k,v in l.items() if 'loss' in k or k=='teacher_lr'} for l in d.state.log_history if 'loss' in l]
           for d in (straight,resumed))
    assert a==b and len(a)==4
    if mode=='trajectory': assert same(straight.guidance.teacher, resumed.guidance.teacher)

def test_it_may_stop_after_any_step(tmp_path):
    "The middle of an epoch, its end (3, 6), between two updates of the teacher, in the middle of a logging interval, at the very end"
    make = lambda: Trajectory(speech(4), lr=1e-3, every=2, warmup=1)
    straight = distiller(tmp_path/'run', make(), save_strategy='steps', save_steps=1)
    straight.train()
    for step in range(1,9):
        resumed = distiller(tmp_path/f'again-{step}', make(), seed=7)
        resumed.train(tmp_path/'run'/f'checkpoint-{step}')
        assert resumed.state.global_step==8, step
        assert same(straight.model, resumed.model) and same(straight.guidance.teacher, resumed.guidance.teacher), step
        losses = [[l['loss'] for l in d.state.log_history if 'loss' in l] for d in (straight,resumed)]
        assert losses[0]==losses[1], step

@pytest.mark.parametrize('to,args', [('mamba2',dict(d_state=8, headdim=8)), ('linformer',dict(k=4, max_length=200, share='layer'))])
def test_a_converted_student_resumes(to, args, tmp_path):
    make = lambda seed: convert(speech(seed), to=to, seed=seed, **args)
    straight = distiller(tmp_path, Target(speech(3)), make(0), max_steps=4, save_strategy='steps', save_steps=2)
    straight.train()
    resumed = distiller(tmp_path/'again', Target(speech(3)), make(1), max_steps=4)
    resumed.train(tmp_path/'checkpoint-2')
    assert same(straight.model, resumed.model)

def test_a_hybrid_goes_on_from_a_target_guided_run(tmp_path):
    distiller(tmp_path/'target', Target(speech(3)), save_strategy='steps', save_steps=3).train()
    straight,branch = (distiller(tmp_path/n, Hybrid(Target(speech(3)), until=5)) for n in ('straight','branch'))
    straight.train()
    branch.train(tmp_path/'target'/'checkpoint-3')
    assert same(straight.model, branch.model)

def test_batches_of_like_length_keep_their_order(tmp_path):
    "transformers draws the order of length-grouped batches from the global generator"
    kw = dict(train_sampling_strategy='group_by_length', max_steps=7)
    rows = [dict(input_ids=torch.randint(2, 20, (3+i%7,)), labels=i%2) for i in range(11)]
    def pad(rows):
        ids = torch.stack([F.pad(r['input_ids'], (0,10-len(r['input_ids'])), value=1) for r in rows])
        return dict(input_ids=ids, attention_mask=(ids!=1).long(), labels=torch.tensor([r['labels'] for r in rows]))
    def make(folder, seed, **more):
        torch.manual_seed(seed)
        model = RobertaForSequenceClassification(RobertaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                               intermediate_size=16, max_position_embeddings=16, pad_token_id=1))
        return Distiller(model, settings(folder, **kw, **more), rows, data_collator=pad, progress='none')
    straight = make(tmp_path, 0, save_strategy='steps', save_steps=5)
    straight.train()
    resumed = make(tmp_path/'again', 1)
    resumed.train(tmp_path/'checkpoint-5') # in the second epoch
    assert same(straight.model, resumed.model)

@pytest.mark.parametrize('workers', [0,2])
def test_the_order_and_the_noise_depend_on_seed_and_epoch_only(workers):
    from torch.utils.data import DataLoader, RandomSampler
    def batches(epoch, seed=0):
        sampler = EpochSampler(RandomSampler(range(11)), seed)
        sampler.epoch = epoch
        loader = DataLoader(SeededBatches(utterances(), collate, seed), 4, sampler=sampler, collate_fn=first, num_workers=workers)
        return [b['input_values'] for b in loader]
    def equal(a, b): return all(torch.equal(x, y) for x,y in zip(a, b, strict=True))
    a = batches(1)
    assert equal(a, batches(1)) and not equal(a, batches(2)) and not equal(a, batches(1, seed=5))

def first(batch): return batch


# interruptions and broken checkpoints ------------------------------------------------------------------------------------------

class Interrupting(list):
    "Sends `signal` when sample 7 is read for training; it is read once before, to describe the run"
    signal,reads = signal.SIGINT,0
    def __getitem__(self, i):
        self.reads += i==7
        if i==7 and self.reads==2: os.kill(os.getpid(), self.signal)
        return super().__getitem__(i)

@pytest.mark.parametrize('sent', [signal.SIGINT,signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(sent, tmp_path):
    handler = signal.getsignal(sent)
    make = lambda: Trajectory(speech(4), lr=1e-3)
    data = Interrupting(utterances())
    data.signal = sent
    d = distiller(tmp_path/'run', make(), data=data)
    with pytest.raises(KeyboardInterrupt, match=r'of 8; .*train\(resume=True\)'): d.train()
    assert 0<d.state.global_step<8 and last_checkpoint(tmp_path/'run').name==f'checkpoint-{d.state.global_step}'
    assert signal.getsignal(sent) is handler
    straight,resumed = distiller(tmp_path/'straight', make()),distiller(tmp_path/'run', make(), seed=5)
    straight.train(); resumed.train(resume=True)
    assert same(straight.model, resumed.model)

@pytest.fixture(scope='module')
def run_with_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoints')
    distiller(folder, Trajectory(speech(4), lr=1e-3), save_strategy='steps', save_steps=4).train()
    return folder

FILES = ['model.safetensors','config.json','optimizer.pt','scheduler.pt','rng_state.pth','trainer_state.json','guidance.safetensors',
         'guidance.json',MANIFEST]

@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('damage', ['cut','gone'])
def test_a_damaged_checkpoint_is_passed_over(name, damage, run_with_checkpoints, tmp_path, caplog):
    run = shutil.copytree(run_with_checkpoints, tmp_path/'run')
    f = run/'checkpoint-8'/name
    assert not checkpoint_problem(f.parent)
    f.unlink() if damage=='gone' else f.write_bytes(f.read_bytes()[:-2])
    assert last_checkpoint(run).name=='checkpoint-4'
    assert 'checkpoint-8 cannot be used' in caplog.text and (name in caplog.text or damage=='gone')
    with pytest.raises(ValueError, match='cannot resume'): distiller(run, Trajectory(speech(4), lr=1e-3)).train(run/'checkpoint-8')

def test_nothing_is_unpickled(run_with_checkpoints, tmp_path):
    "A pickle that runs code, with the right size in the manifest"
    class Bomb:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'boom'),))
    for name in ('optimizer.pt','scheduler.pt','rng_state.pth'):
        folder = shutil.copytree(run_with_checkpoints/'checkpoint-4', tmp_path/name)
        for data in (pickle.dumps(Bomb()), None):
            if data: (folder/name).write_bytes(data)
            else: torch.save(Bomb(), folder/name)
            write_checkpoint_manifest(folder)
            with pytest.raises(pickle.UnpicklingError): distiller(tmp_path/'out', Trajectory(speech(4), lr=1e-3)).train(folder)
        assert not (tmp_path/'boom').exists()
    assert not [p for p in (run_with_checkpoints/'checkpoint-4').iterdir() if p.suffix in ('.bin','.pkl')]

def test_weights_of_another_model_are_refused(run_with_checkpoints, tmp_path):
    d = distiller(tmp_path, Trajectory(speech(4), lr=1e-3), model=speech(num_hidden_layers=3))
    with pytest.raises((ValueError,RuntimeError)): d.train(run_with_checkpoints/'checkpoint-4')

def test_the_last_complete_checkpoint_outlives_a_failed_one(tmp_path, monkeypatch):
    d = distiller(tmp_path, save_strategy='steps', save_steps=2, save_total_limit=1)
    def fail(folder):
        if folder.name=='checkpoint-6': raise OSError('disk full')
        write_checkpoint_manifest(folder)
    monkeypatch.setattr('cald.training.trainer.write_checkpoint_manifest', fail)
    with pytest.raises(OSError, match='disk full'): d.train()
    assert last_checkpoint(tmp_path).name=='checkpoint-4' and [p.name for p in list_checkpoints(tmp_path)]==['checkpoint-4','checkpoint-6']
    monkeypatch.undo()
    d = distiller(tmp_path, save_strategy='steps', save_steps=2, save_total_limit=1)
    d.train(resume=True)
    assert [p.name for p in list_checkpoints(tmp_path)]==['checkpoint-8']

def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    d = distiller(tmp_path, Target(speech(3)), save_strategy='steps', eval_strategy='steps', save_steps=2, eval_steps=2, save_total_limit=1,
                  load_best_model_at_end=True, metric_for_best_model='loss', greater_is_better=True, eval_dataset=utterances(4))
    d.train()
    losses = {l['step']: l['eval_loss'] for l in d.state.log_history if 'eval_loss' in l}
    best = max(losses, key=losses.get)
    assert Path(d.state.best_model_checkpoint).name==f'checkpoint-{best}'
    assert same(d.model, Wav2Vec2ForCTC.from_pretrained(tmp_path/f'checkpoint-{best}'))

def test_a_fresh_run_over_an_old_one_says_so(run_with_checkpoints, tmp_path, caplog):
    run = shutil.copytree(run_with_checkpoints, tmp_path/'run')
    distiller(run, max_steps=1).train()
    assert 'earlier run' in caplog.text
    with pytest.raises(FileNotFoundError, match='no complete checkpoint'): distiller(tmp_path/'empty', max_steps=1).train(True)
    distiller(tmp_path/'empty', max_steps=1).train(resume=True) # begins


# who taught at which step ---------------------------------------------------------------------------------------------------------------

class Watch(TrainerCallback):
    "Trains `d` and notes from outside what happens at which step (steps made so far): each forward with the weights it uses, each update, the work"
    def __init__(self, d, resume=None, work=()): # work: steps whose FLOPs are counted
        self.d,self.forwards,self.updates,self.flops,self.work = d,[],[],{},work
        d.add_callback(self)
        forward,update = Wav2Vec2ForCTC.forward,torch.optim.AdamW.step
        @functools.wraps(forward)
        def watched(model, *args, **kwargs):
            who = 'student' if model is d.model else 'teacher'
            self.forwards.append((d.state.global_step, who, weights(model), bool(kwargs.get('output_hidden_states'))))
            return forward(model, *args, **kwargs)
        def updated(opt, *args, **kwargs):
            if opt is getattr(d.guidance, 'opt', None) or opt is getattr(getattr(d.guidance, 'inner', None), 'opt', None):
                self.updates.append((d.state.global_step, opt.param_groups[0]['lr']))
            return update(opt, *args, **kwargs)
        with pytest.MonkeyPatch.context() as mp:
            mp.setattr(Wav2Vec2ForCTC, 'forward', watched)
            mp.setattr(torch.optim.AdamW, 'step', updated)
            d.train(resume)
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.work: self.count = FlopCounterMode(display=False).__enter__()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step-1 not in self.work: return
        self.count.__exit__(None, None, None)
        self.flops[state.global_step-1] = self.count.get_total_flops()
    def by(self, who): return [(s,w) for s,n,w,_ in self.forwards if n==who]

def weights(model): return sum(p.detach().double().abs().sum().item()*(i+1) for i,p in enumerate(model.parameters()))

@pytest.mark.parametrize('every,warmup,stop', [(1,2,4), (2,1,5), (3,0,2)])
def test_the_teacher_is_updated_on_its_steps_at_its_own_rate(every, warmup, stop, tmp_path):
    "In one run, and in one that goes on from a checkpoint after `stop` steps; the student's own rate is another"
    make = lambda: Trajectory(speech(4), lr=1e-3, every=every, warmup=warmup)
    seen = Watch(distiller(tmp_path/'run', make(), save_strategy='steps', save_steps=stop))
    later = Watch(distiller(tmp_path/'again', make(), seed=7), tmp_path/'run'/f'checkpoint-{stop}')
    n = 8//every # updates
    want = [(every*(u+1),1e-3*(u/warmup if u<warmup else (n-u)/(n-warmup))) for u in range(n)] # after so many steps of the student
    assert [s for s,_ in seen.updates]==[s for s,_ in want]
    assert [r for _,r in seen.updates]==pytest.approx([r for _,r in want])
    assert later.updates==[u for u in seen.updates if u[0]>stop]
    used = seen.by('teacher') # weights in use, two micro-batches a step
    assert [s for s,_ in used]==[s for s in range(8) for _ in (0,1)]
    assert used[0][1]==weights(speech(4)) and later.by('teacher')==[u for u in used if u[0]>=stop]
    assert all(a==b for (_,a),(_,b) in zip(used[::2], used[1::2])) # not between them
    last = weights(seen.d.guidance.teacher)
    after = {s+1 for s in range(8) if used[2*s][1]!=(used[2*s+2][1] if s<7 else last)}
    assert after=={s for s,r in want if r>0} and weights(later.d.guidance.teacher)==last

@pytest.mark.parametrize('cycle,which,stops', [(None,[2,2,5,5,5,9,9,9],(2,4)), ('equal',[2,2,5,5,9,9,9,9],(3,))])
def test_the_snapshot_that_teaches_is_ahead_of_the_student(cycle, which, stops, snapshots, tmp_path):
    "The weights at each step are those in the file of the snapshot, also in runs that go on after `stops` steps"
    of = {}
    for s,folder in snapshots:
        m = speech()
        m.load_state_dict(load_file(folder/'model.safetensors'))
        of[s] = weights(m)
    assert len(set(of.values()))==3
    seen = Watch(distiller(tmp_path/'run', Waypoint(snapshots, cycle=cycle), save_strategy='steps', save_steps=1))
    want = [(step,of[s]) for step,s in enumerate(which) for _ in (0,1)]
    assert seen.by('teacher')==want
    if cycle is None: assert all(s>step for step,s in enumerate(which))
    for stop in stops:
        later = Watch(distiller(tmp_path/f'{stop}', Waypoint(snapshots, cycle=cycle), seed=7), tmp_path/'run'/f'checkpoint-{stop}')
        assert later.by('teacher')==want[2*stop:], stop

QUIET = dict(layerdrop=0., mask_time_prob=0.)

@pytest.mark.parametrize('kind', ['target','trajectory','waypoint'])
def test_after_the_switch_a_step_is_one_of_an_unguided_run(kind, snapshots, tmp_path):
    "No teacher runs, learns or is read, no state is gathered, no work is done that an unguided run does not do; also in runs that go on before and after it"
    loads = []
    def load(folder): loads.append(folder.name); return load_snapshot(folder)
    inner = dict(target=lambda: Target(speech(3, **QUIET)), trajectory=lambda: Trajectory(speech(4, **QUIET), lr=1e-3),
                 waypoint=lambda: Waypoint(snapshots, load=load))[kind]
    def run(folder, g, resume=None, work=(4,5,7), **kw):
        loads.clear()
        return Watch(distiller(tmp_path/folder, g, speech(7 if resume else 0, **QUIET), **kw), resume, work)
    plain,seen = run('plain', Unguided()),run('run', Hybrid(inner(), until=5), save_strategy='steps', save_steps=1)
    assert loads==(['snapshot-2','snapshot-5'] if kind=='waypoint' else []) and not plain.by('teacher')
    def check(w, first):
        assert [s for s,_ in w.by('teacher')]==[s for s in range(first, 5) for _ in (0,1)]
        assert [s for s,_ in w.updates]==([s for s in range(1, 6) if s>first] if kind=='trajectory' else [])
        assert {s for s,_,_,states in w.forwards if states}==set(range(first, 5)) and w.d.guidance.teacher is None
        for s,n in w.flops.items(): assert n>1.2*plain.flops[s] if s<5 else n==plain.flops[s], s
    check(seen, 0)
    check(run('before', Hybrid(inner(), until=5), tmp_path/'run'/'checkpoint-4'), 4)
    assert loads==(['snapshot-5'] if kind=='waypoint' else [])
    check(run('after', Hybrid(inner(), until=5), tmp_path/'run'/'checkpoint-5'), 5)
    assert not loads

# what is run ----------------------------------------------------------------------------------------------------------------------------

def test_evaluation_has_no_teacher_and_the_hybrid_sheds_it(tmp_path):
    teacher,ran = speech(3),[]
    teacher.register_forward_hook(lambda *_: ran.append(d.state.global_step))
    d = distiller(tmp_path, Hybrid(Target(teacher), until=0.5), eval_strategy='steps', eval_steps=1, eval_dataset=utterances(4))
    d.train()
    assert ran==[0,0,1,1,2,2,3,3] # two micro-batches a step
    assert [set(l)&{'loss_task','loss_layer'} for l in d.state.log_history if 'loss' in l]==[{'loss_task','loss_layer'}]*2+[{'loss_task'}]*2
    assert d.guidance.teacher is None

def test_snapshots_are_the_model_of_their_step(tmp_path):
    d = distiller(tmp_path, snapshots=[3,8])
    seen = {}
    d.add_callback(type('Look', (__import__('transformers').TrainerCallback,), {
        'on_step_end': lambda self, args, state, control, model=None, **kw: seen.update({state.global_step: copy.deepcopy(model)})})())
    d.train()
    assert [s for s,_ in find_snapshots(tmp_path)]==[3,8]
    for s,folder in find_snapshots(tmp_path): assert same(Wav2Vec2ForCTC.from_pretrained(folder), seen[s])

def one_step(folder, student, teacher, rows, collate, loss, A, **kw):
    "The micro-batches of one step of plain gradient descent at rate 0.1, and the `Distiller` after it"
    d = Distiller(copy.deepcopy(student), settings(folder, max_steps=1, optim='sgd', learning_rate=0.1, warmup_steps=0, lr_scheduler_type='constant',
                  max_grad_norm=0., gradient_accumulation_steps=A, logging_steps=1), rows, Target(teacher, loss), data_collator=collate, progress='none', **kw)
    batches = list(d.get_train_dataloader())
    assert [len(b['labels']) for b in batches]==[2,2,1]
    d.train()
    return batches,d

def the_step_is(d, student, parts):
    "Did `d` descend from `student` by the gradient of the sum of `parts`, and log them? To the digits of float32, which the loop's factors have"
    student.zero_grad()
    sum(parts.values()).backward()
    for (n,p),q in zip(student.named_parameters(), d.model.parameters(), strict=True):
        step = torch.zeros_like(p) if p.grad is None else 0.1*p.grad
        torch.testing.assert_close(q.detach(), p.detach()-step, rtol=0, atol=1e-5*step.abs().max().item()+1e-9, msg=lambda m: f'{n}: {m}')
    assert sum(p.grad is not None and bool(p.grad.abs().max()>1e-4) for p in student.parameters())>len(list(student.parameters()))/2
    log = d.state.log_history[0]
    assert {k for k in log if k.startswith('loss_')}=={f'loss_{k}' for k in parts}
    for k,v in parts.items(): assert log[f'loss_{k}']==pytest.approx(v.item(), rel=1e-5), k

def outputs(modules, run):
    "What each of `modules` gives in `run()`, and its result"
    got = {}
    hooks = [m.register_forward_hook(lambda m, a, out, i=i: got.__setitem__(i, out[0] if isinstance(out, tuple) else out)) for i,m in enumerate(modules)]
    res = run()
    for h in hooks: h.remove()
    return [got[i] for i in range(len(modules))],res

def normed(x):
    x = x-x.mean(-1, keepdim=True)
    return x/(x.pow(2).mean(-1, keepdim=True)+1e-5).sqrt()

def divergence(s, t, T=2):
    p,logq = (t/T).softmax(-1),(s/T).log_softmax(-1)
    return (p*(p.log()-logq)).sum(-1)

def sentences(n=5):
    g = torch.Generator().manual_seed(0)
    return [dict(input_ids=torch.randint(3, 20, (2+2*i,), generator=g), labels=i%2) for i in range(n)]

def pad_sentences(rows):
    "Padded to three more than the longest"
    n = max(len(r['input_ids']) for r in rows)+3
    ids = torch.stack([F.pad(r['input_ids'], (0,n-len(r['input_ids'])), value=1) for r in rows])
    return dict(input_ids=ids, attention_mask=(ids!=1).long(), labels=torch.tensor([r['labels'] for r in rows]))

SMALL = dict(vocab_size=20, hidden_size=16, num_attention_heads=2, intermediate_size=24, initializer_range=0.3)

def roberta(seed):
    torch.manual_seed(seed)
    return RobertaForSequenceClassification(RobertaConfig(**SMALL, num_hidden_layers=3, max_position_embeddings=20, pad_token_id=1,
                                                          hidden_dropout_prob=0., attention_probs_dropout_prob=0.)).double().eval()

@pytest.mark.parametrize('alphas', [{},dict(alpha=3., alpha_output=0.5)], ids=['as it is','weighted'])
def test_the_paper_nlp_step_is_the_formula(alphas, tmp_path):
    "CE + alpha * sum over all states, the first included, of the plain MSE over all positions, pads included, + alpha_output * 4 KL; micro-batches averaged"
    student,teacher = convert(roberta(0), to='linformer', k=4, seed=0),roberta(1)
    batches,d = one_step(tmp_path, student, teacher, sentences(), pad_sentences, loss_preset('paper-nlp', **alphas), 3)
    parts = dict(task=0., layer=0.)|({'output':0.} if alphas else {})
    assert all((b['attention_mask']==0).any(1).all() for b in batches)
    for b in batches:
        x = {k: b[k] for k in ('input_ids','attention_mask')}
        (S,s),(D,t) = (outputs([m.roberta.embeddings,*m.roberta.encoder.layer], lambda: m(**x).logits) for m in (student,teacher))
        assert len(S)==4
        parts['task'] = parts['task']+F.cross_entropy(s, b['labels'])/3
        for h,g in zip(S, D): parts['layer'] = parts['layer']+alphas.get('alpha', 1)*((h-g.detach())**2).sum()/h.numel()/3
        if alphas: parts['output'] = parts['output']+0.5*2**2*divergence(s, t.detach()).sum()/len(s)/3
    the_step_is(d, student, parts)

def pythia(seed):
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, num_hidden_layers=4, max_position_embeddings=32)).double().eval()

@pytest.mark.parametrize('alphas', [{},dict(alpha=3., alpha_output=0.5)], ids=['as it is','weighted'])
def test_the_paper_lm_step_is_the_formula(alphas, tmp_path):
    "CE + 15 * mean over the states between the first and the last of the MSE of layer-normed states, pads included, + alpha_output * KL"
    student,teacher = convert(pythia(0), to='mamba', seed=0, d_state=4),pythia(1)
    def pad(rows):
        b = pad_sentences(rows)
        return b | dict(labels=b['input_ids'].masked_fill(b['attention_mask']==0, -100))
    batches,d = one_step(tmp_path, student, teacher, sentences(), pad, loss_preset('paper-lm', **alphas), 3)
    parts = dict(task=0., layer=0.)|({'output':0.} if alphas else {})
    for b in batches:
        x = {k: b[k] for k in ('input_ids','attention_mask')}
        (S,s),(D,t) = (outputs(m.gpt_neox.layers, lambda: m(**x).logits) for m in (student,teacher))
        parts['task'] = parts['task']+F.cross_entropy(s[:,:-1].flatten(0,1), b['labels'][:,1:].flatten())/3
        assert len(S)==4 # the states 1 to 4, the last of which the model still normalises
        parts['layer'] = parts['layer']+alphas.get('alpha', 15)*sum((normed(h)-normed(g.detach())).pow(2).mean() for h,g in zip(S[:3], D[:3]))/3/3
        if alphas: parts['output'] = parts['output']+0.5*divergence(s, t.detach()).mean()/3
    the_step_is(d, student, parts)

@pytest.mark.parametrize('alphas', [{},dict(alpha=30., alpha_output=0.)], ids=['ASR','no logits'])
def test_the_paper_speech_step_is_the_formula(alphas, tmp_path):
    "Three unequal micro-batches: sums over valid frames, scaled by the micro-batch's share of the characters and the frames of the step"
    quiet = dict(layerdrop=0., hidden_dropout=0., attention_dropout=0., activation_dropout=0., feat_proj_dropout=0., final_dropout=0.,
                 apply_spec_augment=False)
    student,teacher = convert(speech(0, **quiet), to='mamba2', seed=0, d_state=8, headdim=8).double(),speech(3, **quiet).double().eval()
    for m in (student,teacher): # at 1 and 0, the encoder's last norm would not be seen through that of the loss
        for p in m.wav2vec2.encoder.layer_norm.parameters(): torch.nn.init.normal_(p, 1, 0.5)
    data = [{**r, 'input_values': r['input_values'].double()} for r in utterances(5)]
    batches,d = one_step(tmp_path, student, teacher, data, collate, loss_preset('paper-speech', **alphas), 3, task_sum=True)
    frames = [((b['attention_mask'].sum(1)-10)//5+1-4)//4+1 for b in batches] # of two convolutions, 10 wide by 5 and 4 wide by 4
    assert any(len(set(f.tolist()))>1 for f in frames)
    N,Fr = sum(int((b['labels']>=0).sum()) for b in batches),int(sum(f.sum() for f in frames))
    alpha,alpha_output = alphas.get('alpha', 15),alphas.get('alpha_output', 1)
    parts = dict(task=0., layer=0.)|({'output':0.} if alpha_output else {})
    for b,n in zip(batches, frames):
        x = {k: b[k] for k in ('input_values','attention_mask')}
        def states(m):
            enc = m.wav2vec2.encoder
            hs,logits = outputs([*enc.layers,enc.layer_norm], lambda: m(**x).logits)
            return [*hs[:-2],hs[-1]],logits # the last state is after the encoder's norm
        (S,s),(D,t) = states(student),states(teacher)
        m = torch.arange(s.shape[1])<n[:,None]
        Ni = int((b['labels']>=0).sum())
        assert len(S)==2
        ctc = F.ctc_loss(s.log_softmax(-1).transpose(0,1), b['labels'].clamp(min=0), n, (b['labels']>=0).sum(1), reduction='sum')
        Si = sum((m*(normed(h*m[...,None])-normed(g.detach()*m[...,None])).pow(2).mean(-1)).sum() for h,g in zip(S, D))/2
        parts['task'] = parts['task']+ctc/N
        parts['layer'] = parts['layer']+alpha*Ni/Fr*Si/N
        if alpha_output: parts['output'] = parts['output']+alpha_output*Ni/Fr*(m*divergence(s, t.detach())).sum()/N
    the_step_is(d, student, parts)

def test_label_items_may_come_with_the_batch(tmp_path):
    rows = [dict(input_ids=torch.randint(2, 20, (8,)), attention_mask=torch.ones(8, dtype=torch.long), labels=i%2, num_items=5+i)
            for i in range(4)]
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, pad_token_id=1, hidden_dropout_prob=0., attention_probs_dropout_prob=0.))
    task = lambda out, batch: F.cross_entropy(out.logits, batch['labels'], reduction='sum')
    d = Distiller(model, settings(tmp_path, max_steps=1, logging_steps=1), rows, task_loss=task, task_sum=True, eval_dataset=rows,
                  progress='none')
    batch = {k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in rows[0]}
    loss = task(model.eval()(batch['input_ids'], batch['attention_mask']), batch)/sum(5+i for i in range(4))
    d.train()
    assert d.state.log_history[0]['loss_task']==pytest.approx(loss.item(), rel=1e-5)
    assert d.evaluate()['eval_loss']>0

def test_half_precision_keeps_its_parameters_in_float32(tmp_path):
    student = convert(speech(0), to='mamba2', seed=0, d_state=8, headdim=8)
    d = distiller(tmp_path, Trajectory(speech(4), lr=1e-3), student, bf16=True, max_steps=2)
    d.train()
    for m in (d.model,d.guidance.teacher): assert all(p.dtype==torch.float32 and torch.isfinite(p).all() for p in m.parameters())

@pytest.mark.parametrize('accum', [1,2])
def test_the_parts_of_the_loss_add_up(accum, tmp_path):
    d = distiller(tmp_path, Target(speech(3), loss_preset(alpha_output=1.)), gradient_accumulation_steps=accum, max_steps=4)
    d.train()
    for l in d.state.log_history:
        if 'loss' in l: assert l['loss']==pytest.approx(l['loss_task']+l['loss_layer']+l['loss_output'], rel=1e-6)

def test_a_part_of_the_loss_is_the_mean_over_the_steps_that_had_it(tmp_path):
    "A hybrid that switches after step 5, logged after every step, and once after steps 1 to 4 and 5 to 8, in one run and in one that is resumed after step 6"
    def log(folder, every, resume=None):
        d = distiller(tmp_path/folder, Hybrid(Target(speech(3)), until=5), logging_steps=every, save_strategy='steps', save_steps=6)
        d.train(resume)
        return [l for l in d.state.log_history if 'loss' in l]
    steps,windows = log('steps', 1),log('windows', 4)
    assert windows==log('again', 4, tmp_path/'windows'/'checkpoint-6')
    assert windows[1]['loss_layer']==pytest.approx(steps[4]['loss_layer'], rel=1e-6) # the only step of the window with a teacher
    for window,part in zip(windows, (steps[:4],steps[4:])):
        assert window['loss']==pytest.approx(np.mean([l['loss'] for l in part]), rel=1e-6)
        assert window['loss_task']==pytest.approx(np.mean([l['loss_task'] for l in part]), rel=1e-6)

def test_no_decay_for_norms_biases_and_recurrences(tmp_path):
    student = convert(speech(0), to='mamba2', seed=0, d_state=8, headdim=8)
    student.save_pretrained(tmp_path/'saved')
    student = type(student).from_pretrained(tmp_path/'saved') # marks on parameters are lost on the way
    d = distiller(tmp_path, model=student, weight_decay=0.1)
    opt = d.create_optimizer()
    names = {id(p): n for n,p in student.named_parameters()}
    decay = {g['weight_decay']: {names[id(p)] for p in g['params']} for g in opt.param_groups}
    assert decay[0.1] and not [n for n in decay[0.1] if n.split('.')[-1] in ('bias','A_log','D','dt_bias') or 'norm' in n]
    assert [n for n in decay[0.1] if n.endswith('in_proj.weight')] and len(decay[0.1]|decay[0.])==len(names)

def nan_at(step):
    seen = []
    def task(out, batch):
        seen.append(1)
        return out.logits.mean()*(float('nan') if len(seen)==step else 1.)
    return task

def test_a_loss_that_is_not_finite(tmp_path):
    d = distiller(tmp_path/'raise', Target(speech(3)), task_loss=nan_at(5), save_strategy='steps', save_steps=1)
    with pytest.raises(FloatingPointError, match='step 3: .*task nan, layer [0-9]'): d.train()
    assert last_checkpoint(tmp_path/'raise').name=='checkpoint-2' and all(torch.isfinite(p).all() for p in d.model.parameters())
    d = distiller(tmp_path/'skip', Target(speech(3)), task_loss=nan_at(5), nonfinite='skip')
    d.train()
    assert d.skipped==1 and d.state.global_step==8 and d.state.log_history[-2]['skipped']==1
    assert all(torch.isfinite(p).all() for p in d.model.parameters())
    assert all(np.isfinite(l['loss']) for l in d.state.log_history if 'loss' in l)

def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(tmp_path):
    task = lambda out, batch: (out.logits*0).sum().sqrt() # 0, with slope infinity
    d = distiller(tmp_path, task_loss=task)
    with pytest.raises(FloatingPointError, match='task 0'): d.train()

@pytest.mark.parametrize('kw,word', [(dict(nonfinite='ignore'),'nonfinite'), (dict(save_only_model=True),'snapshots'),
                                     (dict(guidance=Target(speech(3), loss_preset('paper-speech'))),'task_sum')])
def test_arguments_that_cannot_be(kw, word, tmp_path):
    with pytest.raises(ValueError, match=word): distiller(tmp_path, **kw)

@pytest.mark.parametrize('kw,error,message', [
    (dict(guidance=speech(3)), TypeError, r'such as Target\(teacher\), not a'),
    (dict(progress='lines'), ValueError, "unknown progress 'lines': did you mean 'line'"),
    (dict(compute_loss_func=nan_at(5)), ValueError, 'compute_loss_func is not called'),
    (dict(args=dict(label_smoothing_factor=.1)), ValueError, 'pass a `task_loss` that smooths')])
def test_arguments_of_trainer_and_of_another_kind_that_cannot_be(kw, error, message, tmp_path):
    args = settings(tmp_path, **kw.pop('args', {}))
    with pytest.raises(error, match=message): Distiller(speech(), args, utterances(), data_collator=collate, **kw)

def test_the_arguments_are_kept_as_json(run_with_checkpoints):
    assert json.loads((run_with_checkpoints/'checkpoint-4'/'training_args.json').read_text())['learning_rate']==1e-2
