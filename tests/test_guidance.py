"Guidance: the paper's losses written out in float64, and what each mode's teacher does at which step."
import copy, gc, weakref

import numpy as np, pytest, torch, torch.nn.functional as F
from transformers import RobertaConfig, RobertaForSequenceClassification, Wav2Vec2Config, Wav2Vec2ForCTC, get_scheduler
from transformers.utils import ModelOutput

from cald.guidance import Hybrid,Target,Trajectory,Unguided,Waypoint
from cald.hidden_states import complete_hidden_states,run_teacher,state_length,state_mask
from cald.losses import HiddenLoss,loss_preset
from cald.resume import load_state,save_state,seeded_rng


def roberta(seed=0, dropout=0.1):
    torch.manual_seed(seed)
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, pad_token_id=1, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout))

def wav2vec2(seed=0, **kw):
    torch.manual_seed(seed)
    return Wav2Vec2ForCTC(Wav2Vec2Config(**{**dict(vocab_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, conv_dim=(8,8), conv_stride=(5,4), conv_kernel=(10,4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, feat_extract_norm='layer',
        layerdrop=0., mask_time_prob=0.3, mask_time_length=2), **kw}))

def text(seed=0, n=4):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(10)<torch.randint(4, 11, (n,1), generator=g)).long()
    return dict(input_ids=torch.randint(2, 20, (n,10), generator=g)*mask+1-mask, attention_mask=mask,
                labels=torch.randint(0, 2, (n,), generator=g))

def states(L, *shape, seed):
    "Hidden states of an `L`-layer model, and logits, in float64 with gradient"
    g = torch.Generator().manual_seed(seed)
    hs = tuple(torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for _ in range(L+1))
    return hs

def ln(x):
    "Layer norm without weights, written out"
    return (x-x.mean(-1, keepdim=True))/torch.sqrt(((x-x.mean(-1, keepdim=True))**2).mean(-1, keepdim=True)+1e-5)

def kl(s, t, T):
    "KL divergence of softened distributions, written out, over the last axis"
    p,q = (t/T).softmax(-1),(s/T).softmax(-1)
    return (p*(p.log()-q.log())).sum(-1)

same = lambda a, b: all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values()))


# the paper's losses ---------------------------------------------------------------------------------------------------------------

def test_paper_nlp_is_the_raw_sum_over_all_states_padding_included():
    S,D,mask = states(12, 3,7,8, seed=0),states(12, 3,7,8, seed=1),torch.arange(7)<torch.tensor([[7],[5],[2]])
    s,t = torch.randn(3,2, dtype=torch.float64),torch.randn(3,2, dtype=torch.float64)
    loss = loss_preset('paper-nlp', alpha=3., alpha_output=0.5)
    res = loss(ModelOutput(hidden_states=S, logits=s), ModelOutput(hidden_states=D, logits=t), mask)
    layer = 0.
    for l in range(13): layer = layer+torch.nn.MSELoss()(S[l], D[l])
    output = F.kl_div(F.log_softmax(s/2, -1), F.softmax(t/2, -1), reduction='batchmean')*2**2
    torch.testing.assert_close(res['layer'], 3*layer, rtol=1e-12, atol=0)
    torch.testing.assert_close(res['output'], 0.5*output, rtol=1e-12, atol=0)

def test_paper_lm_leaves_out_the_first_and_the_last_state():
    S,D = states(16, 2,9,8, seed=0),states(16, 2,9,8, seed=1)
    s,t = torch.randn(2,9,11, dtype=torch.float64),torch.randn(2,9,11, dtype=torch.float64)
    res = loss_preset('paper-lm', alpha_output=2.)(ModelOutput(hidden_states=S, logits=s), ModelOutput(hidden_states=D, logits=t))
    layer = sum(((ln(S[l])-ln(D[l]))**2).mean() for l in range(1,16))/15
    torch.testing.assert_close(res['layer'], 15*layer, rtol=1e-12, atol=0)
    torch.testing.assert_close(res['output'], 2*kl(s, t, 2).mean(), rtol=1e-12, atol=0) # no square of the temperature

def test_paper_speech_depends_on_the_accumulation_as_the_reference_does():
    chars,sizes = [7,12,5],[(2,6),(3,9),(1,4)]
    micro = [(states(24, *n, 8, seed=i),states(24, *n, 8, seed=10+i), torch.randn(*n, 5, dtype=torch.float64, requires_grad=True),
              torch.randn(*n, 5, dtype=torch.float64), torch.arange(n[1])<torch.randint(2, n[1]+1, (n[0],1))) for i,n in enumerate(sizes)]
    N,Fr = sum(chars),float(sum(m[-1].sum() for m in micro))
    loss = loss_preset('paper-speech', alpha=15., alpha_output=1.)
    ours = sum(sum(loss(ModelOutput(hidden_states=S, logits=s), ModelOutput(hidden_states=D, logits=t), m, n/(Fr*N)).values())
               for (S,D,s,t,m),n in zip(micro, chars))
    got = torch.autograd.grad(ours, [h for S,*_ in micro for h in S[1:]]+[m[2] for m in micro])
    ref = 0.
    for (S,D,s,t,m),n in zip(micro, chars):
        Si = 0.
        for l in range(1,25):
            a,b = S[l]*m[...,None],D[l]*m[...,None]
            Si = Si+(m*((ln(a)-ln(b))**2).mean(-1)).sum()/24
        ref = ref+15*(n/Fr)*Si+1*(n/Fr)*(m*kl(s, t, 2)).sum()
    want = torch.autograd.grad(ref/N, [h for S,*_ in micro for h in S[1:]]+[m[2] for m in micro])
    for a,b in zip(got, want): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)

def test_the_default_does_not_see_padding_and_the_others_say_so():
    S,D = states(3, 2,6,8, seed=0),states(3, 2,6,8, seed=1)
    mask = torch.arange(6)<torch.tensor([[6],[3]])
    noisy = tuple(torch.where(mask[...,None], h, 1e3*torch.randn_like(h)) for h in S)
    a,b = (loss_preset()(ModelOutput(hidden_states=h), ModelOutput(hidden_states=D), mask)['layer'] for h in (S,noisy))
    assert torch.equal(a, b)
    torch.testing.assert_close(a, 10*sum(((ln(s)-ln(d))**2).mean(-1)[mask].mean() for s,d in zip(S[1:], D[1:]))/3, rtol=1e-12, atol=0)
    a,b = (loss_preset('paper-nlp')(ModelOutput(hidden_states=h), ModelOutput(hidden_states=D), mask)['layer'] for h in (S,noisy))
    assert b>100*a

def test_several_heads_are_averaged():
    heads = [(torch.randn(4,3),torch.randn(4,3)),(torch.randn(4,7),torch.randn(4,7))]
    s,t = (tuple(h[i] for h in heads) for i in (0,1))
    got = HiddenLoss(alpha=0., alpha_output=1.)(ModelOutput(logits=s), ModelOutput(logits=t))['output']
    torch.testing.assert_close(got, 4*sum(kl(a, b, 2).mean() for a,b in heads)/2, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('kw,word', [(dict(reduce='max'),'reduce'), (dict(per='frame'),'per')])
def test_bad_fields_are_named(kw, word):
    with pytest.raises(ValueError, match=word): HiddenLoss(**kw)


# valid positions and hidden states -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [60,61,99,150])
def test_frames_are_counted_as_the_model_counts_them(n):
    model = wav2vec2().eval()
    batch = dict(input_values=torch.randn(2,150), attention_mask=(torch.arange(150)<torch.tensor([[150],[n]])).long())
    length = model(**batch, output_hidden_states=True).hidden_states[0].shape[1]
    assert state_length(model, batch)==length
    mask = state_mask(model, batch, length)
    assert mask[1].sum()==model(batch['input_values'][1:,:n]).logits.shape[1]
    assert mask[1].long().diff().max()<=0 # valid frames come first
    del batch['attention_mask']
    assert state_mask(model, batch, length).all()

def test_frame_level_input_needs_no_rule():
    model = wav2vec2()
    frames = dict(attention_mask=(torch.arange(9)<torch.tensor([[9],[4]])).long())
    assert state_length(model, frames)==9 and state_mask(model, frames, 9).sum()==13

def test_a_skipped_layer_hands_on_its_input():
    model = wav2vec2(layerdrop=0.5, apply_spec_augment=False, hidden_dropout=0., attention_dropout=0., activation_dropout=0.,
                     feat_proj_dropout=0., final_dropout=0.).train()
    x = dict(input_values=torch.randn(1,200))
    enc = model.wav2vec2.encoder
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        with torch.no_grad(), complete_hidden_states(model) as fill: hs = fill(model(**x, output_hidden_states=True)).hidden_states
        torch.manual_seed(seed)
        skip = [bool(torch.rand([])<0.5) for _ in enc.layers]
        h = hs[0]
        want = [h]
        with torch.no_grad():
            for layer,s in zip(enc.layers, skip):
                if not s: h = layer(h) if isinstance(layer(h), torch.Tensor) else layer(h)[0]
                want.append(h)
            want[-1] = enc.layer_norm(h)
        assert len(hs)==4
        for a,b in zip(hs, want): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        seen.add(tuple(skip))
    assert len(seen)>3 and not enc._forward_hooks and not enc.dropout._forward_hooks

def test_the_last_state_of_a_wav2vec2_is_after_its_final_norm():
    model = wav2vec2().eval()
    x = dict(input_values=torch.randn(1,200))
    torch.testing.assert_close(run_teacher(model, x).hidden_states[-1], model.wav2vec2(**x).last_hidden_state)

def test_a_teacher_in_train_mode_leaves_the_generators_alone_and_repeats_itself():
    import random
    model = wav2vec2(layerdrop=0.3)
    x = dict(input_values=torch.randn(2,300), attention_mask=torch.ones(2,300, dtype=torch.long), labels=torch.ones(2,3, dtype=torch.long))
    before = random.getstate(),np.random.get_state()[1].copy(),torch.get_rng_state()
    a,b,c = (run_teacher(model, x, train_mode=True, key=k) for k in ((0,1),(0,1),(0,2)))
    assert random.getstate()==before[0] and (np.random.get_state()[1]==before[1]).all() and torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(a.logits, b.logits) and not torch.equal(a.logits, c.logits)
    assert torch.equal(run_teacher(model, x).logits, run_teacher(model, x).logits)

def test_own_rng_is_undone_by_an_error():
    state = torch.get_rng_state()
    with pytest.raises(KeyError), seeded_rng(1): torch.rand(3); raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


# trajectory -------------------------------------------------------------------------------------------------------------------------------

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
    want = []
    for _ in range(9//every): want.append(opt.param_groups[0]['lr']); opt.step(); sched.step()
    assert rates==want

def test_the_trajectory_is_ordinary_fine_tuning():
    "Against a loop of its own, with gradient accumulation, an odd last micro-batch and clipping"
    model = roberta(dropout=0.).double()
    g = Trajectory(model, lr=1e-2, schedule='constant', warmup=0, clip=0.5, weight_decay=0.1)
    g.setup(4)
    own = copy.deepcopy(model)
    opt = torch.optim.AdamW(own.parameters(), lr=1e-2, weight_decay=0.1)
    for step,n in enumerate((2,2,1,2)):
        for i in range(n):
            out = g.teacher_forward(text(10*step+i), step)
            assert not any(h.requires_grad for h in out.hidden_states) and not out.logits.requires_grad
            (own.train()(**text(10*step+i)).loss/n).backward()
        torch.nn.utils.clip_grad_norm_(own.parameters(), 0.5)
        opt.step(); opt.zero_grad()
        g.update(step+1)
    for a,b in zip(own.parameters(), g.teacher.parameters()): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

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
    for step in range(100): g.teacher_forward(text(step, 1), step); g.update(step+1)
    assert g.updates==25 and g.sched.get_last_lr()[0]==pytest.approx(75/90) # it never finishes decaying

def test_frozen_parts_of_a_trajectory_stay():
    model = roberta()
    model.roberta.embeddings.requires_grad_(False)
    g = Trajectory(model, lr=1e-2, warmup=0)
    g.setup(3)
    for step in range(2): g.teacher_forward(text(step), step); g.update(step+1)
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
    "One of two processes with batches of their own"
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    g = Trajectory(roberta(dropout=0.), lr=1e-2, warmup=0)
    g.setup(3)
    for step in range(3): g.teacher_forward(text(2*step+rank, 4), step); g.update(step+1)
    torch.save({k: v.clone() for k,v in g.teacher.state_dict().items()}, f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()

def test_the_teachers_of_two_processes_stay_the_same(tmp_path):
    torch.multiprocessing.spawn(average_in_process, args=(2,str(tmp_path)), nprocs=2)
    a,b = (torch.load(tmp_path/f'{r}.pt', weights_only=True) for r in (0,1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    g = Trajectory(roberta(dropout=0.), lr=1e-2, warmup=0)
    g.setup(3)
    for step in range(3):
        for r in (0,1): g.teacher_forward(text(2*step+r, 4), step)
        g.update(step+1)
    for k,v in g.teacher.state_dict().items(): torch.testing.assert_close(v, a[k], rtol=1e-4, atol=1e-5)


# waypoint ---------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def snapshots(tmp_path_factory):
    folder = tmp_path_factory.mktemp('snapshots')
    for s in (10,20,30): roberta(s).save_pretrained(folder/f'snapshot-{s}')
    return [(s,folder/f'snapshot-{s}') for s in (30,10,20)] # in no order

def test_the_waypoint_is_the_first_snapshot_later_than_the_student(snapshots):
    g = Waypoint(snapshots)
    g.setup(40)
    for step,want in ((0,10),(9,10),(10,20),(19,20),(20,30),(29,30),(30,30),(39,30)):
        out = g.teacher_forward(text(), step)
        assert g.logs()=={'waypoint': want} and torch.equal(out.logits, run_teacher(roberta(want), text()).logits), step

@pytest.mark.parametrize('cycle,total,switches', [(None,40,[10,20]), ('equal',30,[10,20]), ('equal',45,[15,30]), (7,45,[7,14])])
def test_the_conventions_of_speech_and_nlp(snapshots, cycle, total, switches):
    g = Waypoint(snapshots, cycle=cycle)
    g.setup(total)
    which = [g.which(s) for s in range(total)]
    assert [s for s in range(1,total) if which[s]!=which[s-1]]==switches and which[0]==0 and which[-1]==2

def test_loading_a_snapshot_is_lazy_and_draws_nothing(snapshots):
    loads = []
    def load(folder):
        loads.append(folder.name)
        torch.rand(5); np.random.rand(5)
        return roberta(10)
    g = Waypoint(snapshots, load=load)
    g.setup(40)
    assert not loads
    a,b = torch.get_rng_state(),np.random.get_state()[1].copy()
    for step in range(12): g.teacher_forward(text(), step)
    assert loads==['snapshot-10','snapshot-20'] and torch.equal(torch.get_rng_state(), a) and (np.random.get_state()[1]==b).all()

def test_missing_snapshots_are_named_before_training(snapshots, tmp_path):
    with pytest.raises(FileNotFoundError, match='gone-1.*gone-2'): Waypoint([*snapshots, (40,tmp_path/'gone-1'), (50,tmp_path/'gone-2')])
    with pytest.raises(ValueError, match='two snapshots'): Waypoint([snapshots[0], snapshots[0]])


# hybrid -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('until,stop', [(0.4,4), (3,3), (0,0), (0.,0), (1.,10), (99,99), (0.29,3)])
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
    make = dict(target=lambda: Target(roberta()), trajectory=lambda: Trajectory(roberta()), waypoint=lambda: Waypoint(snapshots))[kind]
    g = Hybrid(make(), until=2)
    g.setup(5)
    g.teacher_forward(text(), 0)
    refs = [weakref.ref(p) for p in g.inner.teacher.parameters()]
    for step in range(2): g.teacher_forward(text(), step); g.update(step+1)
    gc.collect()
    assert not any(r() is not None for r in refs)

def test_a_hybrid_keeps_its_output_loss_when_asked():
    g = Hybrid(Target(roberta(), loss_preset(alpha_output=1.)), until=1, after=loss_preset(alpha=0., alpha_output=1.))
    g.setup(3)
    student,mask = run_teacher(roberta(1), text()),text()['attention_mask'].bool()
    assert set(g.loss(student, g.teacher_forward(text(), 0), mask))=={'layer','output'}
    g.update(1)
    assert set(g.loss(student, g.teacher_forward(text(), 1), mask))=={'output'}


# state ------------------------------------------------------------------------------------------------------------------------------------

def modes(snapshots):
    return dict(unguided=Unguided, target=lambda: Target(roberta(), train_mode=True),
                trajectory=lambda: Trajectory(roberta(), lr=1e-2, every=2), waypoint=lambda: Waypoint(snapshots),
                hybrid=lambda: Hybrid(Trajectory(roberta(), lr=1e-2), until=6))

@pytest.mark.parametrize('mode', ['unguided','target','trajectory','waypoint','hybrid'])
@pytest.mark.parametrize('stop', [3,7])
def test_each_mode_goes_on_from_its_state(mode, stop, snapshots, tmp_path):
    make = modes(snapshots)[mode]
    def run(g, steps):
        outs = []
        for step in steps:
            for i in range(2): outs.append(g.teacher_forward(text(2*step+i), step))
            g.update(step+1)
        return outs
    a,b = make(),make()
    a.setup(10); b.setup(10)
    run(a, range(stop))
    save_state(tmp_path/'state', a.state_dict())
    assert {p.suffix for p in tmp_path.iterdir()}=={'.json','.safetensors'}
    b.load_state_dict(load_state(tmp_path/'state'))
    for x,y in zip(run(a, range(stop,10)), run(b, range(stop,10)), strict=True):
        assert (x is None)==(y is None)
        if x is not None: assert torch.equal(x.logits, y.logits) and all(torch.equal(p, q) for p,q in zip(x.hidden_states, y.hidden_states))

def test_a_state_finds_its_own_kind_only(snapshots):
    made = {k: f() for k,f in modes(snapshots).items()}
    for g in made.values(): g.setup(10)
    for a in made:
        for b in made:
            if a==b or (a,b)==('trajectory','hybrid'): continue # a hybrid may go on from a plain run of what it wraps
            with pytest.raises(ValueError): made[b].load_state_dict(made[a].state_dict())

def test_a_hybrid_refuses_another_switch():
    a,b = Hybrid(Target(roberta()), until=3),Hybrid(Target(roberta()), until=4)
    a.setup(10); b.setup(10)
    with pytest.raises(ValueError, match='switch at step 3'): b.load_state_dict(a.state_dict())
