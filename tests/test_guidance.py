"Guidance: the paper's losses written out in float64, and the teacher of each mode at each step."
import copy
import gc
import random
import tempfile
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import RobertaConfig,RobertaForSequenceClassification,TrainingArguments,Wav2Vec2Config,Wav2Vec2ForCTC
from transformers import get_scheduler
from transformers.utils import ModelOutput

from cald.convert import convert
from cald.distill import Distiller
from cald.guidance import Hybrid,Target,Trajectory,Unguided,Waypoint
from cald.hidden_states import complete_hidden_states,run_teacher,state_length,state_mask
from cald.losses import HiddenLoss,loss_preset
from cald.resume import load_state,save_state,seeded_rng


def roberta(seed=0, dropout=0.1):
    torch.manual_seed(seed)
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return RobertaForSequenceClassification(RobertaConfig(
        **size, vocab_size=20, max_position_embeddings=16, pad_token_id=1,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout))

def wav2vec2(seed=0, **kwargs):
    torch.manual_seed(seed)
    size = dict(vocab_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                intermediate_size=32)
    front_end = dict(conv_dim=(8,8), conv_stride=(5,4), conv_kernel=(10,4), num_feat_extract_layers=2,
                     num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm='layer')
    config = dict(do_stable_layer_norm=True, layerdrop=0., mask_time_prob=0.3, mask_time_length=2)
    return Wav2Vec2ForCTC(Wav2Vec2Config(**{**size, **front_end, **config, **kwargs}))

def text(seed=0, n=4):
    "`n` padded sentences with labels"
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(10)<torch.randint(4, 11, (n,1), generator=g)).long()
    ids = torch.randint(2, 20, (n,10), generator=g)*mask+1-mask
    return dict(input_ids=ids, attention_mask=mask, labels=torch.randint(0, 2, (n,), generator=g))

def lengths(n, *counts):
    "Mask (batch, n) of samples with `counts` valid positions"
    return torch.arange(n)<torch.tensor(counts)[:,None]

def states(L, *shape, seed):
    "Hidden states of an `L`-layer model, in float64 with gradient"
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for _ in range(L+1))

def randn(*shape): return torch.randn(*shape, dtype=torch.float64)

def output(hidden_states=None, logits=None): return ModelOutput(hidden_states=hidden_states, logits=logits)

def ln(x):
    "Layer norm without weights, written out"
    centred = x-x.mean(-1, keepdim=True)
    return centred/torch.sqrt((centred**2).mean(-1, keepdim=True)+1e-5)

def kl(s, t, T):
    "KL divergence of softened distributions, written out, over the last axis"
    p = (t/T).softmax(-1)
    q = (s/T).softmax(-1)
    return (p*(p.log()-q.log())).sum(-1)

def same(a, b):
    "Do two models have equal weights?"
    return all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values()))

def run(g, batches):
    "Call guidance `g` as a training loop does; `batches` has the batch of each step"
    for step,batch in enumerate(batches):
        g.teacher_forward(batch, step)
        g.update(step+1)

def generators():
    "States of the random generators of Python, numpy and torch"
    return random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()

def close(a, b, rtol=1e-12, atol=0): torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# the paper's losses ------------------------------

def test_paper_nlp_is_the_raw_sum_over_all_states_padding_included():
    S = states(12, 3,7,8, seed=0)
    D = states(12, 3,7,8, seed=1)
    s = randn(3,2)
    t = randn(3,2)
    loss = loss_preset('paper-nlp', alpha=3., alpha_output=0.5)
    res = loss(output(S, s), output(D, t), lengths(7, 7,5,2))
    layer = 0.
    for l in range(13): layer = layer+torch.nn.MSELoss()(S[l], D[l])
    log_s = F.log_softmax(s/2, -1)
    expected = F.kl_div(log_s, F.softmax(t/2, -1), reduction='batchmean')*2**2
    close(res['layer'], 3*layer)
    close(res['output'], 0.5*expected)

def test_paper_lm_leaves_out_the_first_and_the_last_state():
    S = states(16, 2,9,8, seed=0)
    D = states(16, 2,9,8, seed=1)
    s = randn(2,9,11)
    t = randn(2,9,11)
    res = loss_preset('paper-lm', alpha_output=2.)(output(S, s), output(D, t))
    layer = sum(((ln(S[l])-ln(D[l]))**2).mean() for l in range(1,16))/15
    close(res['layer'], 15*layer)
    close(res['output'], 2*kl(s, t, 2).mean()) # without the square of the temperature

def speech_micro_batch(i, b, l):
    "Hidden states and logits of student and teacher, and a mask"
    s = randn(b, l, 5).requires_grad_()
    mask = torch.arange(l)<torch.randint(2, l+1, (b,1))
    return states(24, b, l, 8, seed=i),states(24, b, l, 8, seed=10+i),s,randn(b, l, 5),mask

def test_paper_speech_depends_on_the_accumulation_as_the_reference_does():
    chars = [7,12,5]
    micro = [speech_micro_batch(i, b, l) for i,(b,l) in enumerate([(2,6),(3,9),(1,4)])]
    N = sum(chars)
    frames = float(sum(m[-1].sum() for m in micro))
    loss = loss_preset('paper-speech', alpha=15., alpha_output=1.)
    ours = reference = 0.
    for (S,D,s,t,mask),n in zip(micro, chars):
        ours = ours+sum(loss(output(S, s), output(D, t), mask, n/(frames*N)).values())
        layers = 0.
        for l in range(1,25):
            a = S[l]*mask[...,None]
            b = D[l]*mask[...,None]
            layers = layers+(mask*((ln(a)-ln(b))**2).mean(-1)).sum()/24
        reference = reference+15*(n/frames)*layers+1*(n/frames)*(mask*kl(s, t, 2)).sum()
    inputs = [h for S,*_ in micro for h in S[1:]]+[m[2] for m in micro]
    got = torch.autograd.grad(ours, inputs)
    expected = torch.autograd.grad(reference/N, inputs)
    for a,b in zip(got, expected): close(a, b, rtol=1e-9, atol=1e-14)

def test_padding_changes_the_nlp_loss_and_not_the_default():
    S = states(3, 2,6,8, seed=0)
    D = states(3, 2,6,8, seed=1)
    mask = lengths(6, 6,3)
    noisy = tuple(torch.where(mask[...,None], h, 1e3*torch.randn_like(h)) for h in S)
    def layer(name, hs): return loss_preset(name)(output(hs), output(D), mask)['layer']
    assert torch.equal(layer('default', S), layer('default', noisy))
    by_hand = sum(((ln(s)-ln(d))**2).mean(-1)[mask].mean() for s,d in zip(S[1:], D[1:]))/3
    close(layer('default', S), 10*by_hand)
    assert layer('paper-nlp', noisy)>100*layer('paper-nlp', S)

def test_several_heads_are_averaged():
    s = torch.randn(4,3),torch.randn(4,7)
    t = torch.randn(4,3),torch.randn(4,7)
    got = HiddenLoss(alpha=0., alpha_output=1.)(output(logits=s), output(logits=t))['output']
    close(got, 4*sum(kl(a, b, 2).mean() for a,b in zip(s, t))/2, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('kw,word', [(dict(reduce='max'),'reduce'), (dict(per='frame'),'per'), (dict(alpha='1'),"alpha must be a number, not '1'"),
                                     (dict(first=1.5),'first'), (dict(norm='no'),'norm must be True or False'), (dict(alpha=None),'alpha')])
def test_bad_fields_are_named(kw, word):
    with pytest.raises((ValueError,TypeError), match=word): HiddenLoss(**kw)

def test_a_loss_of_no_states_is_refused():
    S = states(2, 3,7,8, seed=0)
    with pytest.raises(ValueError, match='first=5 and last=None leave none of the 3 hidden states'): loss_preset(first=5)(output(S), output(S))


# valid positions and hidden states ------------------------------

@pytest.mark.parametrize('n', [60,61,99,150])
def test_frames_are_counted_as_the_model_counts_them(n):
    model = wav2vec2().eval()
    batch = dict(input_values=torch.randn(2,150), attention_mask=lengths(150, 150,n).long())
    length = model(**batch, output_hidden_states=True).hidden_states[0].shape[1]
    assert state_length(model, batch)==length
    mask = state_mask(model, batch, length)
    assert mask[1].sum()==model(batch['input_values'][1:,:n]).logits.shape[1]
    assert mask[1].long().diff().max()<=0 # valid frames come first
    del batch['attention_mask']
    assert state_mask(model, batch, length).all()

def test_frame_level_input_needs_no_rule():
    model = wav2vec2()
    frames = dict(attention_mask=lengths(9, 9,4).long())
    assert state_length(model, frames)==9 and state_mask(model, frames, 9).sum()==13

def test_the_state_of_a_skipped_layer_is_its_input():
    no_dropout = dict.fromkeys(['hidden_dropout','attention_dropout','activation_dropout','feat_proj_dropout',
                                'final_dropout'], 0.)
    model = wav2vec2(layerdrop=0.5, apply_spec_augment=False, **no_dropout).train()
    x = dict(input_values=torch.randn(1,200))
    encoder = model.wav2vec2.encoder
    patterns = set()
    for seed in range(12):
        torch.manual_seed(seed)
        with torch.no_grad(), complete_hidden_states(model) as complete:
            hs = complete(model(**x, output_hidden_states=True)).hidden_states
        torch.manual_seed(seed)
        skipped = [bool(torch.rand([])<0.5) for _ in encoder.layers]
        h = hs[0]
        expected = [h]
        with torch.no_grad():
            for layer,skip in zip(encoder.layers, skipped):
                if not skip: h = layer(h) if isinstance(layer(h), torch.Tensor) else layer(h)[0]
                expected.append(h)
            expected[-1] = encoder.layer_norm(h)
        assert len(hs)==4
        for a,b in zip(hs, expected): close(a, b, rtol=1e-5, atol=1e-5)
        patterns.add(tuple(skipped))
    assert len(patterns)>3 and not encoder._forward_hooks and not encoder.dropout._forward_hooks

def test_the_last_state_of_a_wav2vec2_is_after_its_final_norm():
    model = wav2vec2().eval()
    x = dict(input_values=torch.randn(1,200))
    torch.testing.assert_close(run_teacher(model, x).hidden_states[-1], model.wav2vec2(**x).last_hidden_state)

def test_a_teacher_in_train_mode_leaves_the_generators_alone_and_repeats_itself():
    model = wav2vec2(layerdrop=0.3)
    x = dict(input_values=torch.randn(2,300), attention_mask=torch.ones(2,300, dtype=torch.long),
             labels=torch.ones(2,3, dtype=torch.long))
    before = generators()
    a,b,c = [run_teacher(model, x, train_mode=True, key=key).logits for key in ((0,1),(0,1),(0,2))]
    assert generators()==before
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(run_teacher(model, x).logits, run_teacher(model, x).logits)

def test_seeded_rng_restores_the_generators_after_an_error():
    before = generators()
    with pytest.raises(KeyError), seeded_rng(1):
        torch.rand(3)
        raise KeyError
    assert generators()==before


# trajectory ------------------------------

@pytest.mark.parametrize('every', [1,2,3])
@pytest.mark.parametrize('micro', [1,2])
def test_the_trajectory_moves_on_its_steps_and_no_others(every, micro):
    g = Trajectory(roberta(), lr=1e-2, every=every, warmup=1)
    g.setup(9)
    rates = []
    g.opt.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]['lr']))
    for step in range(9):
        before = copy.deepcopy(g.teacher)
        for i in range(micro):
            g.teacher_forward(text(step*micro+i), step)
            assert same(before, g.teacher) # what the student sees is the teacher before its update
        g.update(step+1)
        assert same(before, g.teacher)==((step+1)%every!=0 or rates[-1]==0)
    assert g.updates==9//every
    p = torch.nn.Parameter(torch.zeros(1))
    opt = torch.optim.AdamW([p], lr=1e-2)
    sched = get_scheduler('linear', opt, num_warmup_steps=1, num_training_steps=9//every)
    expected = []
    for _ in range(9//every):
        expected.append(opt.param_groups[0]['lr'])
        opt.step()
        sched.step()
    assert rates==expected

def test_the_trajectory_is_ordinary_fine_tuning():
    "Against a plain loop, with gradient accumulation, an odd last micro-batch and clipping"
    model = roberta(dropout=0.).double()
    g = Trajectory(model, lr=1e-2, schedule='constant', warmup=0, clip=0.5, weight_decay=0.1)
    g.setup(4)
    plain = copy.deepcopy(model)
    opt = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for step,n in enumerate((2,2,1,2)):
        for i in range(n):
            batch = text(10*step+i)
            out = g.teacher_forward(batch, step)
            assert not any(h.requires_grad for h in out.hidden_states) and not out.logits.requires_grad
            (plain.train()(**batch).loss/n).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        opt.step()
        opt.zero_grad()
        g.update(step+1)
    for a,b in zip(plain.parameters(), g.teacher.parameters()): close(a, b, rtol=1e-9, atol=1e-12)

def test_between_its_updates_a_trajectory_makes_no_gradient():
    g = Trajectory(roberta(), every=2)
    g.setup(4)
    g.teacher_forward(text(), 0)
    assert all(p.grad is None for p in g.teacher.parameters())
    g.teacher_forward(text(), 1)
    assert any(p.grad is not None for p in g.teacher.parameters())

def test_the_reference_schedule_is_there():
    g = Trajectory(roberta(), lr=1., every=4, schedule_steps=100, warmup=10)
    g.setup(100)
    run(g, [text(step, 1) for step in range(100)])
    assert g.updates==25 and g.sched.get_last_lr()[0]==pytest.approx(75/90) # it never finishes decaying

def test_frozen_parts_of_a_trajectory_stay():
    model = roberta()
    model.roberta.embeddings.requires_grad_(False)
    g = Trajectory(model, lr=1e-2, warmup=0)
    g.setup(3)
    run(g, [text(0), text(1)])
    assert same(g.teacher.roberta.embeddings, model.roberta.embeddings) and not same(g.teacher, model)

def test_a_trajectory_whose_gradient_is_not_finite_stops():
    g = Trajectory(roberta(), task_loss=lambda out, batch: out.logits.sum()*float('inf'))
    g.setup(2)
    g.teacher_forward(text(), 0)
    with pytest.raises(FloatingPointError, match="teacher's gradient.*step 1"): g.update(1)

def test_an_own_forward_is_clean():
    g = Trajectory(roberta(), own_forward=True)
    g.setup(2)
    assert torch.equal(g.teacher_forward(text(), 0).logits, run_teacher(roberta(), text()).logits)
    g = Trajectory(roberta())
    g.setup(2)
    assert not torch.equal(g.teacher_forward(text(), 0).logits, run_teacher(roberta(), text()).logits)

def average_in_process(rank, world, folder):
    "One of two processes; each has other batches"
    meet = f'file://{folder}/meet'
    torch.distributed.init_process_group('gloo', init_method=meet, rank=rank, world_size=world)
    g = Trajectory(roberta(dropout=0.), lr=1e-2, warmup=0)
    g.setup(3)
    run(g, [text(2*step+rank, 4) for step in range(3)])
    torch.save({k: v.clone() for k,v in g.teacher.state_dict().items()}, f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()

def test_the_teachers_of_two_processes_stay_the_same(tmp_path):
    torch.multiprocessing.spawn(average_in_process, args=(2,str(tmp_path)), nprocs=2)
    a,b = [torch.load(tmp_path/f'{rank}.pt', weights_only=True) for rank in (0,1)]
    assert all(torch.equal(a[k], b[k]) for k in a)
    g = Trajectory(roberta(dropout=0.), lr=1e-2, warmup=0)
    g.setup(3)
    for step in range(3):
        for rank in (0,1): g.teacher_forward(text(2*step+rank, 4), step)
        g.update(step+1)
    for k,v in g.teacher.state_dict().items(): torch.testing.assert_close(v, a[k], rtol=1e-4, atol=1e-5)


# waypoint ------------------------------

@pytest.fixture(scope='module')
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp('snapshots')
    for s in (10,20,30): roberta(s).save_pretrained(folder/f'snapshot-{s}')
    return [(s,folder/f'snapshot-{s}') for s in (30,10,20)] # in no order

def test_the_waypoint_is_the_first_snapshot_later_than_the_student(snapshots):
    g = Waypoint(snapshots)
    g.setup(40)
    for step,snapshot in ((0,10),(9,10),(10,20),(19,20),(20,30),(29,30),(30,30),(39,30)):
        out = g.teacher_forward(text(), step)
        assert g.logs()=={'waypoint': snapshot}, step
        assert torch.equal(out.logits, run_teacher(roberta(snapshot), text()).logits), step

@pytest.mark.parametrize('cycle,total,switches', [
    (None, 40, [10,20]), ('equal', 30, [10,20]), ('equal', 45, [15,30]), (7, 45, [7,14])])
def test_the_conventions_of_speech_and_nlp(snapshots, cycle, total, switches):
    g = Waypoint(snapshots, cycle=cycle)
    g.setup(total)
    which = [g.which(s) for s in range(total)]
    assert [s for s in range(1,total) if which[s]!=which[s-1]]==switches and which[0]==0 and which[-1]==2

def test_loading_a_snapshot_is_lazy_and_draws_nothing(snapshots):
    loads = []
    def load(folder):
        loads.append(folder.name)
        torch.rand(5)
        np.random.rand(5)
        return roberta(10)
    g = Waypoint(snapshots, load=load)
    g.setup(40)
    assert not loads
    before = generators()
    for step in range(12): g.teacher_forward(text(), step)
    assert loads==['snapshot-10','snapshot-20'] and generators()==before

def test_missing_snapshots_are_named_before_training(snapshots, tmp_path):
    missing = [(40,tmp_path/'gone-1'), (50,tmp_path/'gone-2')]
    with pytest.raises(FileNotFoundError, match='gone-1.*gone-2'): Waypoint([*snapshots, *missing])
    with pytest.raises(ValueError, match='two snapshots'): Waypoint([snapshots[0], snapshots[0]])


# hybrid ------------------------------

@pytest.mark.parametrize('until,stop', [(0.4,4), (3,3), (0,0), (0.,0), (1.,10), (10,10), (0.29,3)])
def test_after_the_switch_no_teacher_runs(until, stop):
    teacher,ran = roberta(),[]
    teacher.register_forward_hook(lambda *_: ran.append(step))
    g = Hybrid(Target(teacher), until=until)
    g.setup(10)
    for step in range(10):
        out = g.teacher_forward(text(), step)
        assert (out is None)==(step>=stop)==(g.loss is None)
        g.update(step+1)
    assert ran==list(range(min(stop, 10)))

@pytest.mark.parametrize('kind', ['target','trajectory','waypoint'])
def test_after_the_switch_the_memory_is_free(kind, snapshots):
    modes = dict(target=lambda: Target(roberta()), trajectory=lambda: Trajectory(roberta()),
                 waypoint=lambda: Waypoint(snapshots))
    g = Hybrid(modes[kind](), until=2)
    g.setup(5)
    g.teacher_forward(text(), 0)
    refs = [weakref.ref(p) for p in g.inner.teacher.parameters()]
    run(g, [text(), text()])
    gc.collect()
    assert not any(r() is not None for r in refs)

def test_a_hybrid_keeps_its_output_loss_when_asked():
    output_only = loss_preset(alpha=0., alpha_output=1.)
    g = Hybrid(Target(roberta(), loss_preset(alpha_output=1.)), until=1, after=output_only)
    g.setup(3)
    student = run_teacher(roberta(1), text())
    mask = text()['attention_mask'].bool()
    assert set(g.loss(student, g.teacher_forward(text(), 0), mask))=={'layer','output'}
    g.update(1)
    assert set(g.loss(student, g.teacher_forward(text(), 1), mask))=={'output'}


@pytest.mark.parametrize('before,after,word', [
    (dict(), dict(name='paper-speech', alpha=0.), "per='item'"), (dict(), dict(alpha=0., alpha_output=1.), 'alpha_output')])
def test_a_later_loss_that_the_teacher_cannot_serve_is_refused(before, after, word):
    with pytest.raises(ValueError, match=word): Hybrid(Target(roberta(), loss_preset(**before)), after=loss_preset(**after))
    with pytest.raises(ValueError, match='needs a guidance with a loss'): Hybrid(Unguided(), after=loss_preset())

@pytest.mark.parametrize('make', [Target,Trajectory])
def test_a_hybrid_whose_teacher_is_freed_asks_for_a_new_one(make):
    g = Hybrid(make(roberta()), until=1)
    for _ in range(2): # two runs
        g.setup(2)
        g.update(1)
    g.setup(2)
    with pytest.raises(RuntimeError, match='as Hybrid does at its switch, make a new guidance'): g.teacher_forward(text(), 0)


# arguments ------------------------------

@pytest.mark.parametrize('make,word', [
    (lambda m: Target('folder'), "model that is loaded, not 'folder'"), (lambda m: Target(None), 'not None'), (lambda m: Trajectory('folder'), "not 'folder'"),
    (lambda m: Target(m, 'paper-nlp'), r"loss_preset\('paper-nlp'\)"), (lambda m: Hybrid(m), 'a Guidance such as Target'), (lambda m: Hybrid('x'), "not 'x'"),
    (lambda m: Hybrid(Target(m), after='paper-nlp'), r"loss_preset\('paper-nlp'\)"),
    (lambda m: Hybrid(Target(m), until='0.4'), "until='0.4': give a fraction"), (lambda m: Hybrid(Target(m), until=1.5), 'until=1.5'),
    (lambda m: Trajectory(m, every=2.5), 'every=2.5: give a number of steps'), (lambda m: Trajectory(m, warmup=2.), 'warmup=2.0: give a fraction'),
    (lambda m: Waypoint(['a','b']), r'give a list of \(step, folder\)'), (lambda m: Waypoint({1:'folder'}), r'give a list of \(step, folder\)'),
    (lambda m: Waypoint('folder'), r'give a list of \(step, folder\)')])
def test_an_argument_of_the_wrong_kind_is_named(make, word):
    with pytest.raises((TypeError,ValueError), match=word): make(roberta())

def test_a_switch_after_the_end_of_the_run_is_refused():
    with pytest.raises(ValueError, match='until=40: the run has 39 steps'): Hybrid(Target(roberta()), until=40).setup(39)


# state ------------------------------

def modes(snapshots):
    return dict(unguided=Unguided, target=lambda: Target(roberta(), train_mode=True),
                trajectory=lambda: Trajectory(roberta(), lr=1e-2, every=2),
                waypoint=lambda: Waypoint(snapshots),
                hybrid=lambda: Hybrid(Trajectory(roberta(), lr=1e-2), until=6))

def outputs_of(g, steps):
    "Outputs of the teacher of `g` for two micro-batches in each of `steps`"
    outs = []
    for step in steps:
        for i in range(2): outs.append(g.teacher_forward(text(2*step+i), step))
        g.update(step+1)
    return outs

@pytest.mark.parametrize('mode', ['unguided','target','trajectory','waypoint','hybrid'])
@pytest.mark.parametrize('stop', [3,7])
def test_each_mode_resumes_from_its_state(mode, stop, snapshots, tmp_path):
    a = modes(snapshots)[mode]()
    b = modes(snapshots)[mode]()
    for g in (a,b): g.setup(10)
    outputs_of(a, range(stop))
    save_state(tmp_path/'state', a.state_dict())
    assert {p.suffix for p in tmp_path.iterdir()}=={'.json','.safetensors'}
    b.load_state_dict(load_state(tmp_path/'state'))
    rest = range(stop, 10)
    for x,y in zip(outputs_of(a, rest), outputs_of(b, rest), strict=True):
        assert (x is None)==(y is None)
        if x is None: continue
        assert torch.equal(x.logits, y.logits)
        assert all(torch.equal(p, q) for p,q in zip(x.hidden_states, y.hidden_states))

def test_a_state_loads_into_its_class_only(snapshots):
    guidances = {mode: make() for mode,make in modes(snapshots).items()}
    for g in guidances.values(): g.setup(10)
    for a in guidances:
        for b in guidances:
            if a==b: continue
            if (a,b)==('trajectory','hybrid'): continue # a hybrid loads a plain run of its inner guidance
            with pytest.raises(ValueError): guidances[b].load_state_dict(guidances[a].state_dict())

def test_a_hybrid_refuses_another_switch():
    a = Hybrid(Target(roberta()), until=3)
    b = Hybrid(Target(roberta()), until=4)
    for g in (a,b): g.setup(10)
    with pytest.raises(ValueError, match='stop=3, not with stop=4'): b.load_state_dict(a.state_dict())

# ---- LoRA

@pytest.mark.parametrize('lora', ['student','teacher','both'])
@pytest.mark.parametrize('guidance', [Target, lambda t: Trajectory(t, lr=1e-3)])
def test_adapters_of_lora_may_be_in_students_and_teachers_of_speech(lora, guidance):
    "Wav2Vec2 completes its hidden states inside the wrapper of peft"
    peft = pytest.importorskip('peft')
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=(8,)*7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=12, mask_time_prob=0.)
    torch.manual_seed(0)
    teacher = Wav2Vec2ForCTC(Wav2Vec2Config(**size))
    student = convert(teacher, to='mamba2', seed=0)
    adapters = peft.LoraConfig(target_modules=['intermediate_dense'], r=2)
    if lora!='teacher': student = peft.get_peft_model(student, adapters)
    if lora!='student': teacher = peft.get_peft_model(teacher, adapters)
    rows = [dict(input_values=torch.randn(3200), labels=torch.tensor([1,2])) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, save_strategy='no', use_cpu=True, report_to='none')
        trainer = Distiller(student, args, rows, guidance(teacher), progress='none')
        trainer.train()
    assert all(log['loss_layer']>0 for log in trainer.state.log_history if 'loss_layer' in log)
