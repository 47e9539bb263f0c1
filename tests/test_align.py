"Initialisation from the attention, calibration, alignment: numbers against references, every family, interruption"
import copy, shutil

import pytest, torch, transformers
from torch import nn
from transformers import (AutoModel, LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification, TrainingArguments,
                          Wav2Vec2Config, Wav2Vec2ForCTC)

import cald
from cald.align import Aligner,Alignment,align
from cald.calibrate import (attention_distances,attention_pairs,calibrate,calibrate_output,choose_layers,head_distances,layer_effects,
                            layer_errors,output_features,on_attention,run_layers)
from cald.convert import convert,report
from cald.distill import Distiller
from cald.guidance import Target
from cald.init import attention_projections,start_from_attention
from cald.models import FAMILIES

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

size = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, initializer_range=.2)
tokens = dict(size, vocab_size=60, max_position_embeddings=60, pad_token_id=1)
sources = dict(llama=(LlamaForCausalLM, LlamaConfig, dict(tokens, num_key_value_heads=2)),
               roberta=(RobertaForSequenceClassification, RobertaConfig, tokens),
               wav2vec2=(Wav2Vec2ForCTC, Wav2Vec2Config, dict(size, vocab_size=12, conv_dim=(16,)*7, num_conv_pos_embeddings=16,
                         num_conv_pos_embedding_groups=4, do_stable_layer_norm=True, feat_extract_norm='layer')))

def model(name):
    cls,config,args = sources[name]
    torch.manual_seed(0)
    return cls(config(**args)).eval()

def samples(name, n=32):
    "Inputs of different lengths"
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 25, (n,), generator=g).tolist()
    if name=='wav2vec2': return [dict(x=torch.randn(320*l, generator=g), labels=torch.randint(3, 12, (3,), generator=g)) for l in lengths]
    return [dict(x=torch.randint(2, 60, (l,), generator=g), labels=torch.tensor(i%2)) for i,l in enumerate(lengths)]

def collate(rows, pad=1, extra=0):
    x = nn.utils.rnn.pad_sequence([r['x'] for r in rows], True, pad)
    x = nn.functional.pad(x, (0,extra), value=pad)
    mask = (torch.arange(x.shape[1])<torch.tensor([[len(r['x'])] for r in rows])).long()
    labels = torch.stack([r['labels'] for r in rows])
    return {'input_values' if x.is_floating_point() else 'input_ids':x, 'attention_mask':mask, 'labels':labels}

def batches(name, **kw): return [collate(samples(name)[i:i+8], **kw) for i in range(0, 32, 8)]

def args(folder, steps=4, **kw):
    return TrainingArguments(str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True, seed=0,
                             save_steps=1, save_strategy='steps', save_total_limit=1, report_to='none', remove_unused_columns=False, **kw)

# ---- the start

@pytest.mark.parametrize('name', FAMILIES)
def test_every_family_starts_from_its_attention(name):
    family = FAMILIES[name]
    config = getattr(transformers, family.config)
    shared = dict(num_key_value_heads=2) if hasattr(config(), 'num_key_value_heads') else {}
    if name=='whisper': shared = dict(decoder_attention_heads=4) # its field num_key_value_heads is the number of heads
    if name=='gpt_neo': shared = dict(attention_types=[[['global'],2]])
    sizes = dict(num_hidden_layers=2, num_attention_heads=4) # moonshine's names have a prefix
    if name=='moonshine': shared,sizes = {},{f'encoder_{k}':v for k,v in sizes.items()}
    config = config(hidden_size=32, vocab_size=60, **sizes, **shared, pad_token_id=1)
    m = AutoModel.from_config(config)
    attention = m.get_submodule(family.attentions(m)[0])
    p = attention_projections(attention, config)
    heads = p.q.weight.shape[0]
    assert p.q.weight.shape==p.k.weight.shape==p.v.weight.shape==(heads,32)
    for i,part in enumerate(family.projections[:3]): # where the registry names them, both agree
        assert torch.equal(p[i].weight, attention.get_submodule(part).weight)
    s = convert(m, 'mamba2', init='attention', seed=0)
    mixer = s.get_submodule(family.attentions(s)[0]).mixer
    for direction in [mixer] if family.causal else [mixer.fw,mixer.bw]:
        d = direction.d_inner
        assert torch.allclose(direction.in_proj.weight[d:2*d], .1*p.v.weight) and not direction.in_proj.weight[:d].any()
    assert set(report(s).query("weights=='new'").start)>={'a memory of 16 positions','0'}

def test_linformer_with_a_slot_for_each_position_is_the_source(tmp_path):
    m = model('roberta')
    s = convert(m, 'linformer', k=60, init='attention').eval()
    s.save_pretrained(tmp_path)
    for student in (s, transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        for b in batches('roberta', extra=3):
            with torch.no_grad(): assert torch.allclose(student.eval()(**b).logits, m(**b).logits, atol=1e-6)
    assert student.config.cald['init']=='attention' and student.config.cald['args']['norm']=='slots'

def test_a_start_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match='known: fresh, attention'): convert(model('roberta'), init='pooled')
    with pytest.raises(ValueError, match="norm='slots'"): convert(model('roberta'), 'linformer', k=4, init='attention', norm='length')
    with pytest.raises(ValueError, match="leave ngroups"): convert(model('roberta'), init='attention', ngroups=1)
    with pytest.raises(ValueError, match="bias=True"): convert(model('llama'), 'mamba', init='attention', bias=False)

def test_the_paper_start_is_unchanged():
    for to,kw in (('mamba2',{}), ('mamba',{}), ('linformer',dict(k=4))):
        s = convert(model('roberta'), to, seed=0, **kw)
        assert 'init' not in s.config.cald

# ---- calibration

def test_distances_are_those_of_a_loop():
    torch.manual_seed(0)
    w = torch.rand(2, 3, 5, 5).softmax(-1)
    mask = torch.arange(5)<torch.tensor([[5],[3]])
    before,after = head_distances(w, mask)
    for h in range(3):
        expected = torch.zeros(2, 2, dtype=torch.float64)
        for b in range(2):
            for q in range(5):
                if not mask[b,q]: continue
                for k in range(5):
                    for side,inside in enumerate((k<=q, k>=q)):
                        if inside: expected[side] += torch.tensor([w[b,h,q,k]*abs(q-k), w[b,h,q,k]]).double()
        assert torch.allclose(torch.stack([before[:,h], after[:,h]]), expected, atol=1e-6)

def test_distances_leave_the_model_as_it_was():
    m = model('llama')
    s = convert(m, init='attention')
    d = attention_distances(s, m, batches('llama'))
    assert m.config._attn_implementation=='sdpa' and d[0].shape==(2,4)
    assert (d[0][0]>0).all() and (d[0][1]==0).all() # causal: nothing comes after a query

@pytest.mark.parametrize('name,to', [('llama','mamba2'),('llama','mamba'),('roberta','mamba2'),('wav2vec2','mamba')])
def test_the_output_is_the_least_squares_solution(name, to):
    m = model(name)
    s = convert(m, to, seed=0, bias=True).eval()
    calibrate_output(s, m, batches(name), ridge=0.)
    features,targets = [],[]
    for b in batches(name):
        def use(i, ours, call, out):
            if i!=1: return
            mask = m._get_feature_vector_attention_mask(out[0].shape[1], b['attention_mask']) if name=='wav2vec2' else b['attention_mask']
            features.append(output_features(ours, call)[0][mask.bool()].double())
            targets.append(out[0][mask.bool()].double())
        with on_attention(s, m, use): run_layers(m, b)
    F,T = torch.cat(features),torch.cat(targets)
    best = torch.linalg.lstsq(F, T, driver='gelsd').solution
    expected = ((F@best-T).square().sum()/T.square().sum()).sqrt().item()
    assert abs(layer_errors(s, m, batches(name))[1]-expected)<1e-3

def test_padding_does_not_change_errors():
    m = model('roberta')
    s = convert(m, seed=0, init='attention').eval()
    one,other = (layer_errors(s, m, batches('roberta', **kw)) for kw in ({}, dict(pad=7, extra=5)))
    assert (one-other).abs().max()<1e-5

def test_a_teacher_of_another_family_is_refused():
    s = convert(model('roberta'), seed=0)
    with pytest.raises(TypeError, match='this student was a roberta model'): attention_pairs(s, model('llama'))
    with pytest.raises(TypeError, match='this student was a roberta model'): align(s, model('llama'), samples('llama'), 2, collate)

# ---- alignment

@pytest.mark.parametrize('name', sources)
@pytest.mark.parametrize('to,init', [('mamba2','attention'),('mamba2','fresh'),('mamba','attention')])
def test_alignment_lowers_every_error(name, to, init):
    m = model(name)
    s = convert(m, to, seed=0, init=init)
    before = {n: p.clone() for n,p in s.state_dict().items()}
    errors = align(s, m, samples(name), 30, collate, progress='none')
    assert (errors.after<errors.before).all() and (errors.after<=errors.calibrated).all()
    assert all(torch.equal(before[n], p) for n,p in s.state_dict().items() if n not in s.new_weights())
    assert all(p.requires_grad for p in s.parameters())

@pytest.mark.parametrize('name', sources)
def test_exact_attention_has_no_error(name):
    m = model(name)
    assert not align(convert(m, 'identity'), m, samples(name), 3, collate, progress='none').to_numpy().any()

class Crash(Exception): pass

def crashing(n):
    "A `collate` that raises at its `n`-th call"
    calls = []
    def f(rows):
        calls.append(1)
        if len(calls)==n: raise Crash
        return collate(rows)
    return f

def weights(m): return {n: p.clone() for n,p in m.state_dict().items()}

@pytest.mark.parametrize('at', [3,8,11]) # in the calibration, in the first and in the last steps
def test_a_resumed_alignment_is_the_same_to_the_bit(tmp_path, at):
    m = model('roberta')
    found = []
    for name,collator in (('straight',collate),('broken',crashing(at))):
        def run(collator):
            s = convert(m, seed=0, init='attention')
            return s,align(s, m, samples('roberta'), 8, collator, folder=tmp_path/name, calibration=4, progress='none', save_steps=2)
        if name=='broken':
            with pytest.raises(Crash): run(collator)
        s,errors = run(collate)
        found.append((weights(s), errors))
    (a,ea),(b,eb) = found
    assert all(torch.equal(a[n], b[n]) for n in a) and ea.equals(eb)

def test_alignment_stops_when_the_loss_no_longer_falls(tmp_path):
    m = model('roberta')
    s = convert(m, 'linformer', k=60, init='attention')
    alignment = Alignment(m, 400, lr=1e-12)
    trainer = Aligner(s, alignment.training_args(tmp_path, per_device_train_batch_size=8), samples('roberta'), m, data_collator=collate)
    trainer.train()
    assert 2*trainer.window<=trainer.state.global_step<400

# ---- as the first part of a training; learning rates by origin

def distiller(folder, collator=collate, steps=4, **kw):
    m = model('roberta')
    s = convert(m, seed=0, init='attention')
    kw = dict(align=Alignment(m, 4, calibration=2), lr_new=1e-2) | kw
    return Distiller(s, args(folder, steps), samples('roberta'), Target(copy.deepcopy(m)), data_collator=collator, progress='none', **kw)

@pytest.mark.parametrize('at', [4,7,10]) # in the alignment twice, in the training
def test_a_training_with_alignment_resumes_to_the_bit(tmp_path, at):
    straight = distiller(tmp_path/'straight')
    straight.train()
    with pytest.raises(Crash): distiller(tmp_path/'broken', crashing(at)).train(resume=True)
    resumed = distiller(tmp_path/'broken')
    resumed.train(resume=True)
    a,b = weights(straight.model),weights(resumed.model)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert (straight.alignment_errors.after<straight.alignment_errors.before).all()

def test_an_alignment_of_other_settings_is_refused(tmp_path):
    distiller(tmp_path, steps=1).train()
    for checkpoint in tmp_path.glob('checkpoint-*'): shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match='other settings: max_steps was 4 and is 5'):
        distiller(tmp_path, align=Alignment(model('roberta'), 5)).train(resume=True)

def test_new_and_transferred_weights_have_their_rates(tmp_path):
    d = distiller(tmp_path, align=None)
    d.create_optimizer()
    new = {id(d.model.get_parameter(n)) for n in d.model.new_weights()}
    rates = {id(p):g['lr'] for g in d.optimizer.param_groups for p in g['params']}
    decays = {id(p):g['weight_decay'] for g in d.optimizer.param_groups for p in g['params']}
    assert len(rates)==len(list(d.model.parameters()))
    assert all(rate==(1e-2 if i in new else 1e-3) for i,rate in rates.items())
    plain = distiller(tmp_path, align=None, lr_new=None)
    plain.create_optimizer()
    expected = {n:g['weight_decay'] for g in plain.optimizer.param_groups for n,p in plain.model.named_parameters() for q in g['params'] if p is q}
    assert {n:decays[id(p)] for n,p in d.model.named_parameters()}==expected

def test_transferred_weights_are_frozen_first(tmp_path):
    d = distiller(tmp_path/'a', align=None, freeze=.5)
    before = weights(d.model)
    changed = []
    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            new = set(d.model.new_weights())
            changed.append(any(not torch.equal(before[n], p) for n,p in d.model.state_dict().items() if n not in new))
    d.add_callback(Watch())
    d.train()
    assert changed==[False,False,True,True] and all(p.requires_grad for p in d.model.parameters())
    with pytest.raises(Crash): distiller(tmp_path/'b', crashing(2), align=None, freeze=.5).train(resume=True)
    resumed = distiller(tmp_path/'b', align=None, freeze=.5)
    resumed.train(resume=True)
    a,b = weights(d.model),weights(resumed.model)
    assert all(torch.equal(a[n], b[n]) for n in a)

def test_rates_need_a_converted_model(tmp_path):
    with pytest.raises(ValueError, match='for converted models'):
        Distiller(model('roberta'), args(tmp_path), samples('roberta'), lr_new=1e-3, data_collator=collate, progress='none')

# ---- which layers

def test_the_most_sensitive_layer_is_kept():
    m = model('roberta')
    with torch.no_grad(): # a layer whose attention does nothing costs nothing
        m.roberta.encoder.layer[1].attention.self.value.weight.zero_()
        m.roberta.encoder.layer[1].attention.self.value.bias.zero_()
    effects = layer_effects(m, batches('roberta'))
    assert effects[1]<1e-6<effects.drop(1).min()
    assert 1 in choose_layers(m, batches('roberta'), 2, effects) and len(choose_layers(m, batches('roberta'), 2, effects))==1
    for keep in (0,3):
        with pytest.raises(ValueError, match='from 1 to 2'): choose_layers(m, batches('roberta'), keep, effects)
