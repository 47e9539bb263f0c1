"Faults that are injected: interruptions, damaged files, numbers that are not finite, foreign folders"
import json, logging, os, re, shutil, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest, torch
from transformers import AutoTokenizer,TrainerCallback

from cald.align import Alignment
from cald.convert import convert
from cald.distill import Distiller,find_snapshots
from cald.files import write_json
from cald.guidance import Hybrid,load_snapshot,Target,Trajectory,Unguided,Waypoint
from cald.lab.experiment import Experiment,Task
from cald.lab.grid import cell,SETTINGS
from cald.lab.queue import begin_run,estimate,train_missing
from cald.lab.recipe import FirstEstimate,LogPace,Recipe,TableDistiller
from cald.lab.results import check_parameters,write_table
from cald.lab.store import out_folder,Store
from cald.losses import loss_preset
from cald.pretrained import shipped,weight_files
from cald.resume import (checkpoint_problem,delete_checkpoint,last_checkpoint,list_checkpoints,load_state,MANIFEST,
                         save_state,write_checkpoint_manifest)
from cald.tasks.text import TextData
from cald.training.loop import as_read,changes,describe,describe_training
from test_distill import collate,distiller,same,settings,speech,utterances

pytestmark = pytest.mark.faults
refused = pytest.mark.faults(refused=True) # for the table in conftest.py

class At(TrainerCallback):
    "Call `action(trainer's control)` at the end of `step`"
    def __init__(self, step, action): self.step,self.action = step,action
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step==self.step: self.action(control)

def interrupted(folder, step, **kw):
    "A run that gets Ctrl-C in `step`, and the message that it ends with"
    d = distiller(folder, Unguided(), **kw)
    d.add_callback(At(step-1, lambda control: setattr(d, '_stopped', True)))
    with pytest.raises(KeyboardInterrupt) as stopped: d.train()
    return d,str(stopped.value)

# interruption

best = dict(eval_dataset=utterances(4), eval_strategy='steps', save_strategy='steps', eval_steps=2, save_steps=2,
            load_best_model_at_end=True, save_total_limit=1)

def test_the_announced_checkpoint_is_kept_if_only_the_best_is_wanted(tmp_path):
    _,message = interrupted(tmp_path/'cut', 5, **best)
    assert 'stopped after step 5 of 8' in message and last_checkpoint(tmp_path/'cut').name=='checkpoint-5'
    again = distiller(tmp_path/'cut', Unguided(), **best)
    again.train(resume=True)
    straight = distiller(tmp_path/'straight', Unguided(), **best)
    straight.train()
    assert same(again.model, straight.model)
    assert [p.name for p in list_checkpoints(tmp_path/'cut')]==[p.name for p in list_checkpoints(tmp_path/'straight')]
    assert len(list_checkpoints(tmp_path/'cut'))==1

def test_a_callback_that_ends_the_run_deletes_no_checkpoint_either(tmp_path):
    d = distiller(tmp_path, Unguided(), **best)
    def stop(control): control.should_save = control.should_training_stop = True
    d.add_callback(At(5, stop))
    d.train()
    assert 'checkpoint-5' in [p.name for p in list_checkpoints(tmp_path)]

def test_ctrl_c_within_an_epoch_makes_no_evaluation_more(tmp_path):
    by_epoch = dict(eval_dataset=utterances(4), eval_strategy='epoch', save_strategy='epoch', load_best_model_at_end=True)
    d,_ = interrupted(tmp_path/'cut', 5, **by_epoch)         # three steps are an epoch
    assert [log['step'] for log in d.state.log_history if 'eval_loss' in log]==[3]
    again = distiller(tmp_path/'cut', Unguided(), **by_epoch)
    again.train(resume=True)
    straight = distiller(tmp_path/'straight', Unguided(), **by_epoch)
    straight.train()
    assert same(again.model, straight.model)
    evaluated = [[log['eval_loss'] for log in t.state.log_history if 'eval_loss' in log] for t in (again,straight)]
    assert evaluated[0]==evaluated[1]

def logs(d):
    "All that `d` has logged, without times"
    return [{k: v for k,v in l.items() if not k.endswith(('_runtime','_per_second','total_flos'))} for l in d.state.log_history]

@pytest.mark.parametrize('stop', [5,8])
def test_the_mean_loss_of_a_resumed_run_is_that_of_all_its_steps(tmp_path, stop):
    "Resumed in the middle of a logging interval, and after its last step"
    straight = distiller(tmp_path, Unguided(), logging_steps=3, save_strategy='steps', save_steps=stop)
    losses = [straight.train().training_loss]
    resumed = distiller(tmp_path/'again', Unguided(), logging_steps=3)
    losses.append(resumed.train(tmp_path/f'checkpoint-{stop}').training_loss)
    assert losses[0]==losses[1]==straight.state.log_history[-1]['train_loss'] and logs(straight)==logs(resumed)

class Seen(TrainerCallback):
    "The steps at which checkpoints were written"
    def __init__(self): self.saved = []
    def on_save(self, args, state, control, **kwargs): self.saved.append(state.global_step)

@pytest.mark.parametrize('unit', ['steps','epoch'])
def test_checkpoints_between_evaluations_change_nothing_and_are_deleted(tmp_path, unit):
    kw = dict(best, eval_strategy=unit, save_strategy=unit, eval_steps=4, save_steps=4)
    runs = []
    for name,minutes in (('often',0),('seldom',15)):
        d = distiller(tmp_path/name, Unguided(), **kw, save_minutes=minutes, callbacks=[seen := Seen()])
        d.train()
        assert seen.saved==(list(range(1, 9)) if minutes==0 else [4,8] if unit=='steps' else [3,6,8])
        runs.append(d)
    assert same(runs[0].model, runs[1].model) and logs(runs[0])==logs(runs[1])
    assert [p.name for p in list_checkpoints(tmp_path/'often')]==[p.name for p in list_checkpoints(tmp_path/'seldom')]
    assert runs[0].state.best_global_step==runs[1].state.best_global_step

def test_a_checkpoint_between_evaluations_is_resumed(tmp_path):
    def end(control): raise SystemExit
    cut = distiller(tmp_path/'cut', Unguided(), save_strategy='steps', save_steps=8, save_minutes=0, callbacks=[At(6, end)])
    with pytest.raises(SystemExit): cut.train()
    assert [p.name for p in list_checkpoints(tmp_path/'cut')]==['checkpoint-5']
    straight,again = (distiller(tmp_path/n, Unguided(), save_strategy='steps', save_steps=8) for n in ('straight','cut'))
    for d in (straight,again): d.train(resume=True)
    assert same(again.model, straight.model) and logs(again)==logs(straight)
    assert [p.name for p in list_checkpoints(tmp_path/'cut')]==['checkpoint-8']

@pytest.mark.parametrize('unit', ['no','steps','epoch'])
def test_ctrl_c_in_the_last_step_loses_nothing(tmp_path, unit):
    evaluated = dict(eval_dataset=utterances(4), load_best_model_at_end=True) if unit!='no' else {}
    kw = dict(evaluated, eval_strategy=unit, save_strategy=unit, eval_steps=4, save_steps=4)
    d,message = interrupted(tmp_path/'cut', 8, **kw)
    assert 'stopped after step 8 of 8' in message and last_checkpoint(tmp_path/'cut').name=='checkpoint-8'
    straight,again = (distiller(tmp_path/n, Unguided(), **kw) for n in ('straight','cut'))
    for t in (straight,again): t.train(resume=True)
    def evaluations(t): return [l for l in logs(t) if 'eval_loss' in l]
    assert same(straight.model, again.model) and evaluations(straight)==evaluations(again)

def test_nothing_is_saved_between_where_nothing_is_to_be_saved(tmp_path):
    distiller(tmp_path, Unguided(), save_minutes=0).train()
    assert not list_checkpoints(tmp_path)

def test_the_evaluation_at_the_end_of_an_epoch_is_not_lost(tmp_path):
    "A run that is killed in it resumes before it, though the last step of the epoch was one to be saved"
    class Killed(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.global_step==6: raise SystemExit
    kw = dict(eval_dataset=utterances(4), eval_strategy='epoch', save_strategy='steps', save_steps=3)
    with pytest.raises(SystemExit): distiller(tmp_path/'cut', Unguided(), **kw, callbacks=[Killed()]).train()
    assert last_checkpoint(tmp_path/'cut').name=='checkpoint-3'
    straight,again = (distiller(tmp_path/n, Unguided(), **kw) for n in ('straight','cut'))
    for d in (straight,again): d.train(resume=True)
    assert same(again.model, straight.model) and logs(again)==logs(straight)

# resumed as another run

def guided(folder, alpha=10., teacher=3, until=6, **kw):
    return distiller(folder, Hybrid(Target(speech(teacher), loss_preset(alpha=alpha)), until=until), **kw)

@pytest.fixture(scope='module')
def guided_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('guided')
    guided(folder, save_strategy='steps', save_steps=4, max_steps=8).train()
    delete_checkpoint(folder/'checkpoint-8')
    return folder

def relabelled(n): return [dict(row, labels=row['labels'].flip(0)+1) for row in utterances(n)]

CHANGED = dict(rate=(dict(learning_rate=2e-2), 'learning_rate was 0.01 and is 0.02'), steps=(dict(max_steps=9), 'max_steps was 8 and is 9'),
    schedule=(dict(lr_scheduler_type='cosine'), "lr_scheduler_type was 'linear' and is 'cosine'"),
    batch=(dict(per_device_train_batch_size=4), 'per_device_train_batch_size was 2 and is 4'),
    accumulation=(dict(gradient_accumulation_steps=1), 'gradient_accumulation_steps was 2 and is 1'),
    order=(dict(data_seed=5), 'data_seed was None and is 5'), length=(dict(data=utterances(12)), 'data.length was 11 and is 12'),
    content=(dict(data=relabelled(11)), "data.content was '[0-9a-f]*' and is"), teacher=(dict(teacher=5), "guidance.teacher was '[0-9a-f]*' and is"),
    alpha=(dict(alpha=5.), 'guidance.loss.alpha was 10.0 and is 5.0'), until=(dict(until=7), 'guidance.until was 6 and is 7'),
    dropout=(dict(model=speech(0, hidden_dropout=.3)), 'model.hidden_dropout was 0.1 and is 0.3'))

@refused
@pytest.mark.parametrize('name', CHANGED)
def test_a_run_is_not_resumed_with_other_settings(guided_run, tmp_path, name):
    kw,message = CHANGED[name]
    d = guided(tmp_path, **kw)
    with pytest.raises(ValueError, match=f'other settings: {message}'): d.train(guided_run/'checkpoint-4')
    assert d.state.global_step==0

@refused
def test_several_changes_are_all_named(guided_run, tmp_path):
    d = guided(tmp_path, alpha=5., learning_rate=2e-2)
    d.args.seed = 4
    with pytest.raises(ValueError, match='learning_rate was.*; seed was 1 and is 4; guidance.loss.alpha was'): d.train(guided_run/'checkpoint-4')

@refused
def test_a_replaced_snapshot_is_noticed(tmp_path):
    for s in (2,5): speech(s).save_pretrained(tmp_path/f'snapshot-{s}')
    def make(): return distiller(tmp_path/'run', Waypoint(find_snapshots(tmp_path)), save_strategy='steps', save_steps=4)
    make().train()
    speech(7).save_pretrained(tmp_path/'snapshot-5')
    with pytest.raises(ValueError, match='guidance.snapshots.5 was'): make().train(tmp_path/'run'/'checkpoint-4')

@refused
def test_an_alignment_is_not_resumed_with_another_teacher(tmp_path):
    def make(teacher): return distiller(tmp_path, Unguided(), convert(speech(0), to='linformer', k=4, max_length=200, seed=0),
                                        align=Alignment(speech(teacher), 2, calibration=1), max_steps=1)
    make(3).train()
    with pytest.raises(ValueError, match="other settings: teacher was"): make(4).train(resume=True)

DECISIVE = """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay optim optim_args adam_beta1 adam_beta2
    adam_epsilon max_grad_norm max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps world_size bf16 fp16
    seed data_seed train_sampling_strategy dataloader_drop_last metric_for_best_model greater_is_better eval_strategy eval_steps""".split()

@refused
@pytest.mark.parametrize('name', DECISIVE)
def test_every_argument_that_decides_a_run_is_compared(name):
    args = dict.fromkeys(DECISIVE, 1)|dict(load_best_model_at_end=True, max_steps=-1 if name=='num_train_epochs' else 1)
    before,now = (describe_training(SimpleNamespace(**args|change)) for change in ({},{name: 2}))
    assert changes(before, now)==[f'{name} was 1 and is 2']

@pytest.fixture(scope='module')
def two_snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    for s in (2,5): speech(s).save_pretrained(folder/f'snapshot-{s}')
    return find_snapshots(folder)

def target(snapshots, teacher=3, **kw): return Target(speech(teacher), **kw)
def trajectory(snapshots, source=3, **kw): return Trajectory(speech(source), **kw)
def waypoint(snapshots, **kw): return Waypoint(snapshots, **kw)
def hybrid(snapshots, until=.4, after=None, **kw): return Hybrid(target(snapshots, **kw), until, after)

common = dict(loss=loss_preset(alpha=5.), seed=4)
TAUGHT = {target: dict(common, teacher=5, train_mode=True), waypoint: dict(common, cycle='equal', train_mode=True),
          hybrid: dict(common, teacher=5, until=.7, after=loss_preset(alpha=1.)),
          trajectory: dict(common, source=5, lr=1e-4, every=2, warmup=.5, schedule='constant', schedule_steps=7, weight_decay=.1, clip=1.,
                           train_mode=False, own_forward=True)}

@refused
@pytest.mark.parametrize('make,name', [(make,name) for make,values in TAUGHT.items() for name in values])
def test_everything_that_decides_a_guidance_is_compared(two_snapshots, make, name):
    before,now = (as_read(describe(make(two_snapshots, **change))) for change in ({},{name: TAUGHT[make][name]}))
    assert [c.split(' was ')[0].split('.')[0] for c in changes(before, now)]==[name]

@refused
@pytest.mark.parametrize('name,value', dict(task_sum=True, lr_new=.1, freeze=.5, eval_dataset=utterances(3), align=Alignment(speech(3), 2)).items())
def test_everything_that_decides_a_distiller_is_compared(tmp_path, name, value):
    "None of it is in the guidance or in the arguments"
    student = convert(speech(0), to='linformer', k=4, max_length=200, seed=0)
    def described(**kw):
        d = Distiller(student, settings(tmp_path), utterances(), data_collator=collate, progress='none', **kw)
        return as_read(d.description())
    before,now = described(),described(**{name: value})
    assert [c.split(' was ')[0] for c in changes(before, now)]==['dev data' if name=='eval_dataset' else name]

@refused
def test_the_floor_of_a_schedule_is_compared(tmp_path):
    def described(floor):
        d = TableDistiller(speech(0), settings(tmp_path), utterances(), data_collator=collate, progress='none', judge=None, floor=floor)
        return as_read(d.description())
    assert changes(described(.1), described(.2))==['floor was 0.1 and is 0.2']

def test_who_asks_for_it_is_warned_only(guided_run, tmp_path, caplog):
    d = guided(tmp_path, alpha=5., learning_rate=2e-2, changed='warn')
    with caplog.at_level(logging.WARNING, 'cald'): d.train(guided_run/'checkpoint-4')
    assert 'guidance.loss.alpha was 10.0 and is 5.0' in caplog.text and 'schedule are those of the checkpoint' in caplog.text
    assert d.state.global_step==8

def test_what_decides_nothing_may_change(guided_run, tmp_path):
    d = guided(tmp_path, logging_steps=1, save_strategy='steps', save_steps=2, save_minutes=0, model=speech(9))
    d.train(guided_run/'checkpoint-4')
    assert d.state.global_step==8

def test_a_checkpoint_of_an_earlier_version_describes_nothing_and_is_resumed(guided_run, tmp_path):
    old = shutil.copytree(guided_run/'checkpoint-4', tmp_path/'checkpoint-4')
    (old/'run.json').unlink()
    state = load_state(old/'guidance')
    for name in ('loss_sum','loss_since_log','last_log'): del state[name]
    save_state(old/'guidance', state)
    write_checkpoint_manifest(old)
    straight,d = guided(tmp_path/'straight'),guided(tmp_path/'again')
    straight.train(), d.train(old)
    assert same(straight.model, d.model)

def test_one_object_resumes_after_its_teacher_is_freed(tmp_path):
    d = guided(tmp_path, until=2, callbacks=[At(4, lambda control: setattr(d, '_stopped', True))])
    with pytest.raises(KeyboardInterrupt): d.train()
    d.train(resume=True)
    assert d.state.global_step==8

# damaged checkpoints

def flip(path):
    "Change one byte in the middle of a file"
    data = bytearray(path.read_bytes())
    data[len(data)//2] ^= 1
    path.write_bytes(data)

@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    distiller(folder, Unguided(), save_strategy='steps', save_steps=4).train()
    return folder

@pytest.mark.parametrize('name', ['model.safetensors','optimizer.pt','rng_state.pth','guidance.json','trainer_state.json'])
def test_one_changed_byte_is_noticed_and_the_older_checkpoint_is_used(checkpoints, tmp_path, caplog, name):
    shutil.copytree(checkpoints, tmp_path/'run')
    flip(tmp_path/'run'/'checkpoint-8'/name)
    with caplog.at_level(logging.WARNING, 'cald'): found = last_checkpoint(tmp_path/'run')
    assert found.name=='checkpoint-4' and f'the content of {name} has changed' in caplog.text

@refused
@pytest.mark.parametrize('content', [b'\xff\xfe\x00', b'', b'[1,2]', b'null', b'{"model.safetensors"'])
def test_a_manifest_that_is_no_manifest_is_a_damaged_checkpoint(checkpoints, tmp_path, content):
    shutil.copytree(checkpoints/'checkpoint-8', tmp_path/'checkpoint-8')
    (tmp_path/'checkpoint-8'/MANIFEST).write_bytes(content)
    assert 'is damaged' in checkpoint_problem(tmp_path/'checkpoint-8')

def test_a_manifest_of_an_earlier_version_has_sizes_only(checkpoints, tmp_path):
    shutil.copytree(checkpoints/'checkpoint-8', tmp_path/'checkpoint-8')
    file = tmp_path/'checkpoint-8'/MANIFEST
    file.write_text(json.dumps({k: v['size'] for k,v in json.loads(file.read_text()).items()}))
    assert checkpoint_problem(tmp_path/'checkpoint-8')==''

def test_only_exact_names_are_checkpoints_and_snapshots(tmp_path):
    for name in ('checkpoint-2','checkpoint-backup-12','checkpoint-best-99','checkpoint-²','checkpoint-3.old','snapshot-4','snapshot-x-5'):
        (tmp_path/name).mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)]==['checkpoint-2']
    assert [step for step,_ in find_snapshots(tmp_path)]==[4]

def test_a_link_is_deleted_and_its_target_stays(checkpoints, tmp_path):
    (tmp_path/'checkpoint-8').symlink_to(checkpoints/'checkpoint-8')
    delete_checkpoint(tmp_path/'checkpoint-8')
    assert not (tmp_path/'checkpoint-8').exists() and checkpoint_problem(checkpoints/'checkpoint-8')==''

@refused
def test_a_snapshot_without_a_layer_is_refused(tmp_path):
    model = speech()
    model.save_pretrained(tmp_path, state_dict={k: v for k,v in model.state_dict().items() if 'layers.1.' not in k})
    with pytest.raises(ValueError, match='weights are missing, such as wav2vec2.encoder.layers.1'): load_snapshot(tmp_path)

@refused
def test_a_snapshot_of_a_deeper_model_is_refused(tmp_path):
    "Without the check, its third layer would be left out"
    speech(num_hidden_layers=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path/'config.json').read_text())
    write_json(tmp_path/'config.json', dict(config, num_hidden_layers=2))
    with pytest.raises(ValueError, match='weights are unexpected, such as wav2vec2.encoder.layers.2'): load_snapshot(tmp_path)

# numbers that are not finite

def spoil(model, control):
    with torch.no_grad(): next(p for p in model.parameters() if p.requires_grad)[0] = float('nan')

@refused
def test_weights_that_became_nan_in_the_last_step_are_no_result(tmp_path):
    d = distiller(tmp_path, Unguided())
    d.add_callback(At(8, lambda control: spoil(d.model, control)))
    with pytest.raises(FloatingPointError, match='has values that are not finite'): d.train()

@refused
def test_weights_that_are_nan_are_never_saved(tmp_path):
    d = distiller(tmp_path, Unguided(), save_strategy='steps', save_steps=2)
    d.add_callback(At(4, lambda control: spoil(d.model, control)))
    with pytest.raises(FloatingPointError): d.train()
    assert last_checkpoint(tmp_path).name=='checkpoint-2' and len(list_checkpoints(tmp_path))==1

def endless(n): return [dict(row, input_values=torch.full_like(row['input_values'], float('inf'))) for row in utterances(n)]

@refused
def test_a_run_in_which_every_step_is_skipped_is_a_failure(tmp_path):
    d = distiller(tmp_path, Unguided(), data=endless(8), nonfinite='skip')
    with pytest.raises(FloatingPointError, match='all 8 steps were skipped'): d.train()

@pytest.mark.parametrize('make', [lambda t: Trajectory(t, warmup=0), lambda t: Hybrid(Trajectory(t, warmup=0), until=.9)])
def test_a_sample_that_is_not_finite_is_skipped_by_a_trajectory_teacher_too(tmp_path, make):
    data = utterances(16)
    data[5]['input_values'][:] = float('inf')
    d = distiller(tmp_path, make(speech(3)), data=data, nonfinite='skip', max_steps=4)
    d.train()
    assert d.skipped==1 and all(p.isfinite().all() for p in d.model.parameters())
    losses = [log['teacher_loss'] for log in d.state.log_history if 'teacher_loss' in log]
    assert losses and all(map(torch.isfinite, map(torch.tensor, losses)))

@refused
def test_a_frozen_trajectory_teacher_is_an_error_that_says_so(tmp_path):
    teacher = speech(3).requires_grad_(False)
    with pytest.raises(ValueError, match='all weights of this one are frozen'): distiller(tmp_path, Trajectory(teacher)).train()

# the store of runs

def test_asking_for_the_owner_keeps_the_lock(tmp_path):
    store = Store(tmp_path)
    mine,theirs = (store.run(cell('toy'), 'data') for _ in range(2))
    assert mine.acquire() and mine.owner() and not theirs.acquire() and theirs.owner()
    mine.release()
    assert theirs.acquire()

@pytest.mark.parametrize('name,content', [('config.json','{"version": 3}'), ('config.json','[]'), ('result.json','')])
def test_a_foreign_folder_in_the_store_is_named_and_left_out(tmp_path, capsys, name, content):
    store = Store(tmp_path)
    for seed in (0,1):
        run = store.run(cell('toy', seed=seed), 'data')
        run.start()
        run.finish(dict(score=1.))
    (run.folder/name).write_text(content)
    assert [r.cell.seed for r in store.runs()]==[0]
    assert f'{run.folder} is left out' in capsys.readouterr().out

def test_checkpoints_stay_until_the_result_is_written(tmp_path, monkeypatch):
    store = Store(tmp_path)
    c = cell('toy')
    def fn(c, run):
        write_json(run.folder/'train'/'checkpoint-3'/'x.json', {})
        return dict(score=1.)
    with monkeypatch.context() as m:
        m.setattr('cald.lab.store.Run.finish', lambda *args: (_ for _ in ()).throw(SystemExit('killed')))
        with pytest.raises(SystemExit): train_missing([c], fn, store, 'data')
    run = store.run(c, 'data')
    assert not run.done and list_checkpoints(run.folder/'train')
    train_missing([c], fn, store, 'data')
    assert run.done and not list_checkpoints(run.folder/'train')

# experiments

class Toy(Experiment):
    tasks = dict(toy=Task('toy', 'toy', 'loss', False))
    record = 0
    training = dict(logging_steps=1, report_to=[])
    def judge(self, model, ds): return dict(loss=1.)
    collate = staticmethod(collate)

@pytest.mark.parametrize('steps,evals,waypoints,snapshots', [(4,10,2,{4}), (4,2,0,{2,4}), (12,6,3,{4,8,12}), (3,2,1,{2})])
def test_a_short_standard_run_leaves_a_snapshot(tmp_path, steps, evals, waypoints, snapshots):
    "Without one, waypoint guidance would fail after the standard model is trained"
    r = Recipe(steps=steps, batch=2, lr=1e-3, lr_student=1e-3, alpha=1., evals=evals, waypoints=waypoints)
    run = Store(tmp_path).run(cell('toy'), 'data')
    trainer = Toy().make_trainer(run.cell, r, run, speech(), Unguided(), dict(train=utterances(4), dev=utterances(2)), None)
    assert trainer.snapshots==snapshots and (trainer.args.logging_steps,trainer.save_minutes)==(1,15.)

def test_a_long_run_logs_its_pace(tmp_path):
    run = Store(tmp_path).run(cell('toy'), 'data')
    distiller(tmp_path/'run', Unguided(), max_steps=2, callbacks=[LogPace(run, minutes=0)]).train()
    lines = (tmp_path/'progress.log').read_text().splitlines()
    assert len(lines)==2 and re.fullmatch(r'toy .*: step 1/2, [0-9.]+ s a step, 0:00:[0-9]+ left', lines[0])

class Slow(TrainerCallback):
    "A step takes at least a tenth of a second"
    def on_step_begin(self, args, state, control, **kwargs): time.sleep(.1)

def measured(store, c, steps, **kw):
    "A finished run of cell `c`, the first of four of two modes, and its first estimate"
    todo = [store.run(replace(c, mode=mode, seed=c.seed+i), 'data') for mode in (c.mode,'other') for i in (0,1)]
    run = todo[0]
    begin_run(run, store, SimpleNamespace(set_description=print), todo, False, 1)
    first = FirstEstimate(run, after=0)
    distiller(run.folder/'train', Unguided(), callbacks=[first,Slow()], max_steps=steps, **kw).train()
    run.finish(dict(loss=1.))
    return run,first

def test_the_estimate_after_ten_steps_is_within_a_third(tmp_path, monkeypatch):
    "The second run of the mode takes as long, those of another mode twice as long; only `Slow` lets time pass"
    now = [time.monotonic()]
    def tick(self, args, state, control, **kwargs): now[0] += .1+.1*(state.global_step==0) # the first step is slower
    monkeypatch.setattr(Slow, 'on_step_begin', tick)
    for module in ('recipe','store'): monkeypatch.setattr(f'cald.lab.{module}.time', SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setitem(SETTINGS, 'toy', dict(demo=dict(steps=30)))
    store = Store(tmp_path)
    run,first = measured(store, cell('toy'), 30, eval_dataset=utterances(2), eval_strategy='steps', eval_steps=15)
    assert first.seconds==pytest.approx((2+2*2)*run.record['seconds'], rel=1/3)
    line = (tmp_path/'progress.log').read_text().splitlines()[-1]
    assert re.fullmatch(r'.* for 4 runs, as measured here; ([0-9.]+ GiB of memory, )?0.00 GiB a checkpoint', line)

def test_each_mode_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, 'toy', dict(demo=dict(steps=11)))
    store = Store(tmp_path)
    said = []
    for mode,seed in (('standard',0),('target',0),('target',1)):
        measured(store, cell('toy', mode=mode, seed=seed), 11)
        said.append((tmp_path/'progress.log').read_text().count('as measured here'))
    assert said==[1,2,2]

def test_a_trial_of_two_steps_tells_the_time_of_a_long_run(tmp_path, monkeypatch):
    "Most of its seconds are not for its steps"
    monkeypatch.setitem(SETTINGS, 'toy', dict(demo=dict(steps=2)))
    store = Store(tmp_path)
    trial,_ = measured(store, cell('toy'), 2)
    write_json(trial.folder/'result.json', dict(trial.record, seconds=60.))
    long = store.run(cell('toy', seed=1), 'data')
    long.settings['steps'] = 90_000
    seconds = estimate([long], [trial])
    step = trial.record['step_seconds']
    assert .1<=step<2 and seconds==pytest.approx(60+89_998*step)

# names and folders

@refused
def test_results_stay_in_their_folder(tmp_path):
    with pytest.raises(ValueError, match='without folders'): write_table('../x', pd.DataFrame(dict(a=[1])), None, tmp_path)
    with pytest.raises(ValueError, match='without folders'): check_parameters({'table':'../x', '__annotations__':{'table':str}}, {})

@pytest.mark.skipif(os.geteuid()==0 if hasattr(os, 'geteuid') else False, reason='root may write everywhere')
def test_a_default_folder_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch):
    (tmp_path/'out').mkdir(mode=0o500)
    monkeypatch.setenv('CALD_OUT', str(tmp_path/'out'))
    with pytest.raises(ValueError, match='cannot write to'): check_parameters({'out':'', '__annotations__':{'out':str}}, {})

@refused
def test_a_default_folder_below_a_file_is_found_before_training(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('CALD_OUT', str(tmp_path/'file'/'out'))
    with pytest.raises(ValueError, match='cannot write to'): check_parameters({'out':'', '__annotations__':{'out':str}}, {})

def test_paths_are_relative_to_the_working_folder_and_know_the_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    assert out_folder('mine')==tmp_path/'mine' and out_folder('~/x')==tmp_path/'home'/'x'
    assert Store('mine').root==tmp_path/'mine' and Store('~/x').root==tmp_path/'home'/'x'

def test_weights_in_an_old_format_belong_to_the_data(tmp_path):
    for f in shipped('roberta-demo').iterdir():
        if f.name!='model.safetensors': shutil.copy(f, tmp_path)
    df = pd.DataFrame(dict(text=['a','b'], text_b=[None,None], label=['0','1'], split=['train','train']))
    df.attrs = dict(hash='x')
    hashes = []
    for content in (b'one', b'two'):
        (tmp_path/'pytorch_model.bin').write_bytes(content)
        assert [p.name for p in weight_files(tmp_path)]==['pytorch_model.bin']
        hashes.append(TextData(df, AutoTokenizer.from_pretrained(tmp_path), 8, str(tmp_path)).hash)
    assert hashes[0]!=hashes[1]
