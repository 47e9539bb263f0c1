"The training loop: a resumed run is the uninterrupted one, bit for bit; broken checkpoints; what is run, logged and decayed."
import copy, json, os, pickle, random, shutil, signal, subprocess, sys, textwrap, time
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from transformers import RobertaConfig, RobertaForSequenceClassification, TrainingArguments, Wav2Vec2Config, Wav2Vec2ForCTC

from cald.convert import convert
from cald.distill import Distiller, find_snapshots, seed_all
from cald.guidance import Hybrid, Target, Trajectory, Unguided, Waypoint, loss_preset, state_mask
from cald.state import MANIFEST, EpochSampler, SeededBatches, checkpoints, last_checkpoint, what_is_wrong, write_manifest


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
    own = {k: kw.pop(k) for k in list(kw) if k in ('snapshots','nonfinite','task_loss','task_sum','eval_dataset','callbacks')}
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
    "Presses Ctrl-C at sample 7"
    def __getitem__(self, i):
        if i==7: os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(i)

def test_ctrl_c_ends_the_step_saves_and_says_how_to_go_on(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    make = lambda: Trajectory(speech(4), lr=1e-3)
    d = distiller(tmp_path/'run', make(), data=Interrupting(utterances()))
    with pytest.raises(KeyboardInterrupt, match=r'of 8; .*train\(resume=True\)'): d.train()
    assert 0<d.state.global_step<8 and last_checkpoint(tmp_path/'run').name==f'checkpoint-{d.state.global_step}'
    assert signal.getsignal(signal.SIGINT) is handler
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
    assert not what_is_wrong(f.parent)
    f.unlink() if damage=='gone' else f.write_bytes(f.read_bytes()[:-2])
    assert last_checkpoint(run).name=='checkpoint-4'
    assert 'checkpoint-8 is passed over' in caplog.text and (name in caplog.text or damage=='gone')
    with pytest.raises(ValueError, match='cannot go on'): distiller(run, Trajectory(speech(4), lr=1e-3)).train(run/'checkpoint-8')

def test_nothing_is_unpickled(run_with_checkpoints, tmp_path):
    "A pickle that runs code, with the right size in the manifest"
    class Bomb:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'boom'),))
    for name in ('optimizer.pt','scheduler.pt','rng_state.pth'):
        folder = shutil.copytree(run_with_checkpoints/'checkpoint-4', tmp_path/name)
        for data in (pickle.dumps(Bomb()), None):
            if data: (folder/name).write_bytes(data)
            else: torch.save(Bomb(), folder/name)
            write_manifest(folder)
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
        write_manifest(folder)
    monkeypatch.setattr('cald.distill.write_manifest', fail)
    with pytest.raises(OSError, match='disk full'): d.train()
    assert last_checkpoint(tmp_path).name=='checkpoint-4' and [p.name for p in checkpoints(tmp_path)]==['checkpoint-4','checkpoint-6']
    monkeypatch.undo()
    d = distiller(tmp_path, save_strategy='steps', save_steps=2, save_total_limit=1)
    d.train(resume=True)
    assert [p.name for p in checkpoints(tmp_path)]==['checkpoint-8']

def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    d = distiller(tmp_path, Target(speech(3)), save_strategy='steps', eval_strategy='steps', save_steps=2, eval_steps=2, save_total_limit=1,
                  load_best_model_at_end=True, metric_for_best_model='loss', greater_is_better=True, eval_dataset=utterances(4))
    d.train()
    losses = {l['step']: l['eval_loss'] for l in d.state.log_history if 'eval_loss' in l}
    best = max(losses, key=losses.get)
    assert Path(d.state.best_model_checkpoint).name==f'checkpoint-{best}'
    assert same(d.model, Wav2Vec2ForCTC.from_pretrained(tmp_path/f'checkpoint-{best}'))

KILLED = '''
    import sys
    sys.path[:0] = sys.argv[2:]
    from test_distill import *
    class Slow(Trajectory):
        "Takes its time while a checkpoint is being written"
        def state_dict(self):
            state = super().state_dict()
            if self.updates>=4: print('writing', flush=True); time.sleep(60)
            return state
    distiller(sys.argv[1], Slow(speech(4), lr=1e-3), save_strategy='steps', save_steps=2).train()
'''

def test_a_run_killed_while_it_writes_goes_on_from_the_checkpoint_before(tmp_path):
    here = Path(__file__).parent
    p = subprocess.Popen([sys.executable, '-c', textwrap.dedent(KILLED), str(tmp_path/'run'), str(here), str(here.parent)],
                         stdout=subprocess.PIPE, text=True)
    try: assert p.stdout.readline().strip()=='writing'
    finally: p.kill()
    assert p.wait()==-signal.SIGKILL
    assert (tmp_path/'run'/'checkpoint-4'/'model.safetensors').exists() # written in part
    assert last_checkpoint(tmp_path/'run').name=='checkpoint-2'
    class Slow(Trajectory): pass
    straight,resumed = (distiller(tmp_path/n, Slow(speech(4), lr=1e-3)) for n in ('straight','run'))
    straight.train(); resumed.train(resume=True)
    assert same(straight.model, resumed.model)

def test_a_fresh_run_over_an_old_one_says_so(run_with_checkpoints, tmp_path, caplog):
    run = shutil.copytree(run_with_checkpoints, tmp_path/'run')
    distiller(run, max_steps=1).train()
    assert 'earlier run' in caplog.text
    with pytest.raises(FileNotFoundError, match='no complete checkpoint'): distiller(tmp_path/'empty', max_steps=1).train(True)
    distiller(tmp_path/'empty', max_steps=1).train(resume=True) # begins


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

def test_the_paper_speech_step_is_the_formula(tmp_path):
    "One step of plain gradient descent over three unequal micro-batches, in float64, against the formula of the reference"
    quiet = dict(layerdrop=0., hidden_dropout=0., attention_dropout=0., activation_dropout=0., feat_proj_dropout=0., final_dropout=0.,
                 apply_spec_augment=False)
    student,teacher = speech(0, **quiet).double(),speech(3, **quiet).double().eval()
    data = [{**r, 'input_values': r['input_values'].double()} for r in utterances(6)]
    d = distiller(tmp_path, Target(teacher, loss_preset('paper-speech')), copy.deepcopy(student), data, task_sum=True, max_steps=1,
                  optim='sgd', learning_rate=0.1, warmup_steps=0, lr_scheduler_type='constant', max_grad_norm=0.,
                  gradient_accumulation_steps=3, logging_steps=1)
    batches = list(d.get_train_dataloader())
    d.train()
    ln = lambda x: F.layer_norm(x, x.shape[-1:])
    N = sum(int((b['labels']>=0).sum()) for b in batches)
    masks = [state_mask(student, b, student.wav2vec2._get_feat_extract_output_lengths(b['input_values'].shape[1])) for b in batches]
    Fr = sum(int(m.sum()) for m in masks)
    total = 0.
    for b,m in zip(batches, masks):
        s = student.train()(**b)
        inputs = {k: b[k] for k in ('input_values','attention_mask')}
        S,D,t = *(q(**inputs, output_hidden_states=True) for q in (student.wav2vec2,teacher.wav2vec2)),teacher(**b)
        Ni = int((b['labels']>=0).sum())
        hs,ht = ((*o.hidden_states[:-1],o.last_hidden_state) for o in (S,D))
        Si = sum((m*(ln(x*m[...,None])-ln(y.detach()*m[...,None])).pow(2).mean(-1)).sum() for x,y in zip(hs[1:], ht[1:]))/2
        p,logq = (t.logits.detach()/2).softmax(-1),(s.logits/2).log_softmax(-1)
        kl = (m*(p*(p.log()-logq)).sum(-1)).sum()
        total = total+(s.loss+15*Ni/Fr*Si+1*Ni/Fr*kl)/N # s.loss is the sum over the batch: config.ctc_loss_reduction
    total.backward()
    assert student.config.ctc_loss_reduction=='sum' and len(batches)==3
    for p,q in zip(student.parameters(), d.model.parameters(), strict=True):
        want = p.detach() if p.grad is None else p.detach()-0.1*p.grad
        torch.testing.assert_close(want, q.detach(), rtol=1e-5, atol=1e-8) # the loop's factors are float32
    assert d.state.log_history[0]['loss']==pytest.approx(total.item(), rel=1e-5)

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

def test_the_arguments_are_kept_as_json(run_with_checkpoints):
    assert json.loads((run_with_checkpoints/'checkpoint-4'/'training_args.json').read_text())['learning_rate']==1e-2
