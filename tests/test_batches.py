"Batches of bounded size: every plan, and runs that use them"
import pytest, torch

from cald.training.batches import BoundedBatches,pack
from cald.distill import Distiller
from test_distill import collate,distiller,same,settings,speech,utterances

def durations(n, seed=0):
    "Seconds of utterances as VoxCeleb1 has them: most of 4 to 12, some of up to 145"
    g = torch.Generator().manual_seed(seed)
    return (4+torch.empty(n).log_normal_(1.2, .8, generator=g)).clamp(max=145).tolist()

@pytest.mark.parametrize('parts', [1,2,3,4])
@pytest.mark.parametrize('size,limit', [(12,140.6), (24,60.), (12,8.), (12,1e9)])
def test_batches_stay_under_their_bound_and_hold_every_sample_once(size, limit, parts):
    seconds = durations(2500)
    shares = [BoundedBatches(seconds, size, limit, seed=1) for _ in range(parts)]
    for i,b in enumerate(shares): b.share(i, parts)
    number = len(shares[0])
    kept = []
    for epoch in range(4):
        for b in shares: b.epoch = epoch
        batches = [[[i for _,i in part] for part in split] for split in zip(*shares, strict=True)]
        assert len(batches)==number
        for split in batches:
            assert len(set(map(len, split)))==1 # every process has as many
            whole = sum(split, [])
            assert len(whole)<=size
            assert len(whole)*max(seconds[i] for i in whole)<=limit or len(whole)==parts
        seen = sorted(i for split in batches for part in split for i in part)
        assert len(seen)==len(set(seen)) # no sample twice
        kept.append(len(seen)/len(seconds))
    assert kept[0]>=1-parts/len(seconds) and min(kept)>.95

def test_the_order_depends_on_seed_and_epoch_only():
    seconds = durations(300)
    def order(seed, epoch):
        b = BoundedBatches(seconds, 8, 100., seed)
        b.epoch = epoch
        return list(b)
    first = order(0, 0)
    torch.rand(5)
    assert order(0, 0)==first and order(0, 1)!=first and order(1, 0)!=first

def test_an_epoch_has_as_many_batches_as_the_first_whatever_its_order():
    seconds = [1.]*40+[30.]*3
    b = BoundedBatches(seconds, 16, 40., bucket=8) # long ones fall into few or many of the buckets
    counts = {len(b._packed(e)) for e in range(30)}
    assert len(counts)>1
    for b.epoch in range(30): assert sum(1 for _ in b)==len(b)

def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match='batches of 9 cannot be divided into 2 parts'): BoundedBatches([1.]*9, 9, 9.).share(0, 2)

def test_pack_keeps_the_order_and_fills_batches():
    assert pack([4,1,0], [3,3,9,9,1], 2, 6)==[[4,1],[0]]
    assert pack([], [], 2, 6)==[]
    assert pack([0,1,2], [7,7,7], 4, 1.)==[[0],[1],[2]] # each exceeds the limit alone

def bounded(): return BoundedBatches([len(u['input_values']) for u in utterances()], size=4, limit=3*6400)

def test_a_run_of_bounded_batches_resumes_to_the_bit(tmp_path):
    straight = distiller(tmp_path/'run', max_steps=6, save_strategy='steps', save_steps=1, batches=bounded())
    straight.train()
    assert straight.state.epoch>1
    for step in range(1, 7):
        again = distiller(tmp_path/f'again-{step}', max_steps=6, seed=7, batches=bounded())
        again.train(tmp_path/'run'/f'checkpoint-{step}')
        assert again.state.global_step==6 and same(straight.model, again.model), step

def test_a_run_is_not_resumed_with_other_bounds(tmp_path):
    distiller(tmp_path, max_steps=2, save_strategy='steps', save_steps=2, batches=bounded()).train()
    other = bounded()
    other.limit = 1e9
    with pytest.raises(ValueError, match='batches'): distiller(tmp_path, max_steps=2, save_strategy='steps', save_steps=2, batches=other).train(resume=True)
    with pytest.raises(ValueError, match='batches'): distiller(tmp_path, max_steps=2, save_strategy='steps', save_steps=2).train(resume=True)

def test_a_process_that_sees_two_gpus_uses_one_and_keeps_its_batch(tmp_path, caplog):
    "Trainer would give each of them `per_device_train_batch_size` samples, and the teacher would be on the first one only"
    args = settings(tmp_path, max_steps=1)
    args.n_gpu
    args._n_gpu = 2
    assert args.train_batch_size==4
    d = Distiller(speech(), args, utterances(), None, data_collator=collate, progress='none')
    assert args.train_batch_size==2 and 'one of 2 GPUs is used' in caplog.text
    d.train()
    assert not isinstance(d.model_wrapped, torch.nn.DataParallel)
