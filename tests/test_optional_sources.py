"Sources from PyPI: a CTranslate2 file made here, damaged files, packages that are missing or other, a GGUF model, the family Whisper"
import hashlib, importlib.util, struct, sys

import numpy as np, pytest, torch, transformers
from transformers import (AutoModelForCausalLM, AutoModelForSpeechSeq2Seq, LlamaConfig, LlamaForCausalLM, TrainingArguments, WhisperConfig,
                          WhisperForConditionalGeneration, WhisperModel)

import cald
from cald.align import align
from cald.convert import convert
from cald.distill import Distiller
from cald.models import FAMILIES
from cald.pretrained import load_pretrained
from cald.tasks import sources
from cald.tasks.sources import (Packaged, WHISPER_ENDS, WHISPER_PARTS, cached_source, packaged_folder, plain_copy, read_ctranslate2, read_whisper,
                                smollm2, whisper, whisper_names)
from common import data_folder

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

tokens = dict(bos_token_id=1, eos_token_id=1, pad_token_id=1, decoder_start_token_id=2)
sizes = dict(vocab_size=20, num_mel_bins=4, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=4,
             encoder_ffn_dim=12, decoder_ffn_dim=20, max_source_positions=6, max_target_positions=9)

def tiny_whisper(seed=0):
    torch.manual_seed(seed)
    config = WhisperConfig(**sizes, **tokens, begin_suppress_tokens=None, init_std=.2)
    return WhisperForConditionalGeneration(config).eval()

def spoken(n=2):
    torch.manual_seed(1)
    labels = torch.randint(3, 20, (n,5))
    return dict(input_features=torch.randn(n,4,12), labels=labels, decoder_input_ids=torch.cat([torch.full((n,1), 2), labels[:,:-1]], 1))

# ---- CTranslate2's file

def as_text(s): return struct.pack('<H', len(s)+1)+s.encode()+b'\0'

def as_variable(name, array):
    kind = dict(float16=4, int16=2)[array.dtype.name]
    shape = struct.pack(f'<B{array.ndim}I', array.ndim, *array.shape)
    return as_text(name)+shape+struct.pack('<BI', kind, array.nbytes)+array.tobytes()

def as_file(variables, architecture='WhisperSpec', aliases=(('decoder/projection/weight','decoder/embeddings/weight'),), version=6):
    named = b''.join(as_variable(*item) for item in variables.items())
    tail = b''.join(map(as_text, (x for pair in aliases for x in pair)))
    return struct.pack('<I', version)+as_text(architecture)+struct.pack('<II', 3, len(variables))+named+struct.pack('<I', len(aliases))+tail

def ends(part):
    if part=='position_encodings': return ['encodings']
    return ['gamma','beta'] if part.endswith('layer_norm') else ['weight','bias']

def as_ctranslate2(model):
    "The variables of a Whisper, joined as CTranslate2 joins them; written from the names of transformers, in half precision"
    state = {k: v.numpy().astype(np.float16) for k,v in model.state_dict().items()}
    found = {}
    for side in ('encoder','decoder'):
        layers = getattr(model.config, f'{side}_layers')
        for place in ['', *(f'layer_{i}/' for i in range(layers))]:
            for part in WHISPER_PARTS:
                for end in ends(part):
                    name = f'{side}/{place}{part}/{end}'
                    keys = whisper_names(name)
                    if not any(k in state for k in keys): continue
                    width = len(state[next(k for k in keys if k in state)])
                    found[name] = np.concatenate([state.get(k, np.zeros(width, np.float16)) for k in keys])
        found[f'{side}/num_heads'] = np.array(getattr(model.config, f'{side}_attention_heads'), np.int16)
    return found

def test_a_whole_whisper_comes_back():
    model = tiny_whisper()
    again = read_whisper(as_file(as_ctranslate2(model)), **tokens)
    assert again.state_dict().keys()==model.state_dict().keys()
    for k,v in model.state_dict().items(): assert torch.equal(again.state_dict()[k], v.half().float()), k
    assert {k: getattr(again.config, k) for k in sizes}==sizes and again.config.decoder_start_token_id==2
    assert again.proj_out.weight is again.model.decoder.embed_tokens.weight
    with torch.no_grad(): assert torch.allclose(again(**spoken()).logits, model(**spoken()).logits, atol=.05)

def test_queries_keys_and_values_are_not_exchanged():
    variables = as_ctranslate2(tiny_whisper())
    fused = variables['encoder/layer_1/self_attention/linear_0/weight']
    state = read_whisper(as_file(variables), **tokens).state_dict()
    for i,part in enumerate('qkv'):
        rows = torch.from_numpy(fused[16*i:16*(i+1)].astype(np.float32))
        assert torch.equal(state[f'model.encoder.layers.1.self_attn.{part}_proj.weight'], rows)

def test_every_truncated_file_is_refused():
    data = as_file({'encoder/x':np.ones((2,3), np.float16)}, aliases=[('y','encoder/x')])
    read_ctranslate2(data)
    for n in range(len(data)):
        with pytest.raises(ValueError, match='^model.bin, byte'): read_ctranslate2(data[:n])

@pytest.mark.parametrize('data,problem', [
    (b'\x80\x04', 'bytes are missing'),
    (as_file({}, version=5), 'version 5 of the format; known is 6'),
    (as_file({}, aliases=[('a','b')]), 'an alias of b, which is not there'),
    (as_file({}, aliases=[])+b'x', 'goes on after its end'),
    (struct.pack('<I', 6)+struct.pack('<H', 2)+b'ab', 'a name has no end'),
    (struct.pack('<I', 6)+as_text('W')+struct.pack('<II', 3, 2**32-1), 'bytes are missing')])
def test_a_damaged_file_is_refused(data, problem):
    with pytest.raises(ValueError, match=problem): read_ctranslate2(data)

def with_variable(content): return struct.pack('<I', 6)+as_text('W')+struct.pack('<II', 3, 1)+as_text('x')+content

@pytest.mark.parametrize('content,problem', [
    (struct.pack('<BIBI', 1, 3, 9, 3)+b'abc', 'unknown type 9'),
    (struct.pack('<BIBI', 1, 3, 4, 5)+b'abcde', r'5 bytes do not fill the shape \(3,\)'),
    (struct.pack('<BIIIBI', 3, 2**32-1, 2**32-1, 2**32-1, 4, 8)+b'12345678', 'do not fill the shape')])
def test_a_variable_that_cannot_be_is_refused(content, problem):
    with pytest.raises(ValueError, match=problem): read_ctranslate2(with_variable(content))

def test_a_name_twice_is_refused():
    x = as_variable('x', np.ones(1, np.float16))
    with pytest.raises(ValueError, match='x is there twice'):
        read_ctranslate2(struct.pack('<I', 6)+as_text('W')+struct.pack('<II', 3, 2)+x+x+struct.pack('<I', 0))

def test_another_or_incomplete_model_is_refused():
    variables = as_ctranslate2(tiny_whisper())
    def read(changes, **kwargs): return read_whisper(as_file({**variables, **changes}, **kwargs), **tokens)
    with pytest.raises(ValueError, match='a TransformerSpec, not a WhisperSpec'): read({}, architecture='TransformerSpec')
    with pytest.raises(ValueError, match='output projection'): read({}, aliases=[])
    with pytest.raises(ValueError, match='unknown tensor encoder/conv3/weight'): read({'encoder/conv3/weight':np.ones(2, np.float16)})
    keys = np.ones(48, np.float16)
    with pytest.raises(ValueError, match='a bias of the keys'): read({'encoder/layer_0/self_attention/linear_0/bias':keys})
    without = {k: v for k,v in variables.items() if k!='decoder/layer_0/ffn/linear_1/bias'}
    with pytest.raises(ValueError, match='1 weights are missing or unknown, as model.decoder.layers.0.fc2.bias'): read_whisper(as_file(without), **tokens)
    del without['encoder/num_heads']
    with pytest.raises(ValueError, match="no 'encoder/num_heads'"): read_whisper(as_file(without), **tokens)

# ---- packages

def package(folder, monkeypatch, content=b'mine', expected=b'mine'):
    "A package with one file of weights, and its source"
    (folder/'real_other').mkdir()
    (folder/'real_other'/'__init__.py').write_text('raise ImportError("never imported")')
    (folder/'real_other'/'weights').write_bytes(content)
    monkeypatch.syspath_prepend(folder)
    return Packaged('other', 'real_other', 'real-other==1', 'real', dict(weights=hashlib.sha256(expected).hexdigest()), 'MIT')

def test_a_missing_package_says_what_to_install(monkeypatch):
    for name,source,read in (('SMOLLM2',sources.SMOLLM2,smollm2), ('WHISPER',sources.WHISPER,whisper)):
        absent = Packaged(**{**vars(source), 'module':'no_such_module'})
        monkeypatch.setattr(sources, name, absent)
        with pytest.raises(ModuleNotFoundError, match=rf"needs {source.package}: pip install --no-deps {source.package}.*'cald\[{source.extra}\]'"): read()

def test_a_missing_reader_is_named(tmp_path, monkeypatch):
    source = package(tmp_path, monkeypatch)
    source = Packaged(**{**vars(source), 'needs':('no_such_reader',)})
    with pytest.raises(ModuleNotFoundError, match='the source other needs no_such_reader: .* && pip install no_such_reader'): packaged_folder(source)

def test_other_weights_are_refused_before_they_are_read(tmp_path, monkeypatch):
    source = package(tmp_path, monkeypatch, b'other')
    monkeypatch.setenv('CALD_CACHE', str(tmp_path/'cache'))
    found,expected = (hashlib.sha256(x).hexdigest() for x in (b'other',b'mine'))
    def write(packaged, out): raise AssertionError('read')
    with pytest.raises(ValueError, match=f'weights of real_other has the sha256 {found}, not {expected}: install real-other==1'): cached_source(source, write)
    assert not (tmp_path/'cache').exists()

def test_a_source_is_written_once_and_whole(tmp_path, monkeypatch):
    source = package(tmp_path, monkeypatch)
    monkeypatch.setenv('CALD_CACHE', str(tmp_path/'cache'))
    def broken(packaged, out):
        (out/'config.json').write_text('{')
        raise OSError('disk full')
    with pytest.raises(OSError, match='disk full'): cached_source(source, broken)
    assert not list((tmp_path/'cache').iterdir())
    written = []
    def write(packaged, out): written.append((out/'config.json').write_text((packaged/'weights').read_text()))
    folders = {cached_source(source, write) for _ in range(2)}
    assert len(folders)==len(written)==1 and 'other-' in folders.pop() and len(list((tmp_path/'cache').iterdir()))==1

def test_the_extras_name_the_packages():
    from configparser import ConfigParser
    from pathlib import Path
    root = Path(__file__).parents[1]
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    pins = (root/'constraints.txt').read_text().split()
    for source in (sources.SMOLLM2,sources.WHISPER):
        assert source.package in ini['DEFAULT'][f'{source.extra}_requirements'].split() and source.package in pins
        assert f"'{source.extra}'" in (root/'setup.py').read_text()

# ---- a GGUF model

def write_tiny_gguf(path):
    "A Llama of two layers as GGUF, without a tokenizer"
    gguf = pytest.importorskip('gguf', reason='GGUF needs the extra `smollm2`')
    w = gguf.GGUFWriter(path, 'llama')
    w.add_context_length(32); w.add_embedding_length(32); w.add_block_count(2); w.add_feed_forward_length(48)
    w.add_head_count(4); w.add_head_count_kv(2); w.add_layer_norm_rms_eps(1e-5); w.add_rope_dimension_count(8); w.add_vocab_size(50)
    w.add_rope_freq_base(10000.)
    rng = np.random.default_rng(0)
    def add(name, *shape): w.add_tensor(name, (rng.standard_normal(shape)*.2).astype(np.float32))
    add('token_embd.weight', 50, 32); add('output_norm.weight', 32)
    for i in range(2):
        for part,shape in dict(attn_q=(32,32), attn_k=(16,32), attn_v=(16,32), attn_output=(32,32), ffn_gate=(48,32), ffn_up=(48,32), ffn_down=(32,48),
                               attn_norm=(32,), ffn_norm=(32,)).items(): add(f'blk.{i}.{part}.weight', *shape)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

def test_a_student_of_a_gguf_model_saves_loads_and_trains(tmp_path):
    write_tiny_gguf(tmp_path/'tiny.gguf')
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file='tiny.gguf', dtype=torch.float32).eval()
    assert 'quantization_config' in read.config.to_dict(), 'else plain_copy is not needed'
    model = plain_copy(read)
    x = torch.randint(0, 50, (2,9))
    with torch.no_grad(): assert torch.equal(model(x).logits, read(x).logits)
    model.save_pretrained(tmp_path/'plain')
    model = load_pretrained(AutoModelForCausalLM, tmp_path/'plain').eval()
    with torch.no_grad(): assert torch.equal(model(x).logits, read(x).logits)
    student = convert(model, init='attention', seed=0).eval()
    assert 'quantization_config' not in student.config.to_dict() and 'quantization_config' not in model.config.to_dict()
    student.save_pretrained(tmp_path/'student')
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'student').eval()
    with torch.no_grad(): assert torch.equal(again(x).logits, student(x).logits)
    rows = [dict(input_ids=t, labels=t) for t in x]
    before = {k: v.clone() for k,v in again.state_dict().items()}
    args = TrainingArguments(str(tmp_path/'train'), max_steps=1, use_cpu=True, report_to='none', save_strategy='no', per_device_train_batch_size=2)
    Distiller(again, args, rows, progress='none').train()
    assert any(not torch.equal(v, before[k]) for k,v in again.state_dict().items())

# ---- Whisper

@torch.no_grad()
def everything(model):
    out = model(**spoken(), output_hidden_states=True)
    return [*out.encoder_hidden_states, *out.decoder_hidden_states, out.logits]

def same(a, b): return all(map(torch.equal, a, b))

def test_identity_is_the_source_to_the_bit():
    model = tiny_whisper()
    unchanged = convert(model, 'identity')
    assert same(everything(model), everything(unchanged)) and type(unchanged).__name__=='CaldWhisperForConditionalGeneration'
    assert torch.equal(*(m.generate(spoken()['input_features'], max_new_tokens=5) for m in (model,unchanged)))

@pytest.mark.parametrize('to,kwargs', [('mamba2',{}), ('mamba2',dict(init='attention')), ('mamba2',dict(layers=[1])), ('linformer',dict(k=3, max_length=6))])
def test_only_the_encoders_attention_is_replaced(to, kwargs, tmp_path):
    model = tiny_whisper()
    source = {k: v.clone() for k,v in model.state_dict().items()}
    student = convert(model, to, seed=0, **kwargs).eval()
    new = set(student.new_weights())
    assert new and all(n.startswith('model.encoder.layers.') and '.self_attn.mixer.' in n for n in new)
    state = student.state_dict()
    assert all(torch.equal(state[k], source[k]) for k in state if k not in new)
    gone = {k for k in source if k not in state}
    assert all(k.startswith('model.encoder.layers.') and '.self_attn.' in k for k in gone)
    student.save_pretrained(tmp_path)
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).eval()
    assert same(everything(again), everything(student))
    x = spoken()['input_features']
    a,b,c = student.generate(x, max_new_tokens=5),student.generate(x, max_new_tokens=5, use_cache=False),again.generate(x, max_new_tokens=5)
    assert torch.equal(a, b) and torch.equal(a, c)

def test_linformer_with_a_slot_for_each_position_is_the_source():
    model = tiny_whisper()
    student = convert(model, 'linformer', k=6, max_length=6, init='attention').eval()
    for a,b in zip(everything(student), everything(model)): assert torch.allclose(a, b, atol=1e-5)

def test_generate_uses_the_decoders_cache(monkeypatch):
    student = convert(tiny_whisper(), seed=0).eval()
    seen = []
    forward = student.model.decoder.forward
    def record(*args, **kwargs):
        seen.append(kwargs['input_ids'].shape[1])
        return forward(*args, **kwargs)
    monkeypatch.setattr(student.model.decoder, 'forward', record)
    student.generate(spoken()['input_features'], max_new_tokens=4)
    assert seen[1:] and set(seen[1:])=={1}, 'the decoder reads one token at a time'

def test_the_base_model_converts_too(tmp_path):
    model = tiny_whisper().model
    assert type(model) is WhisperModel
    student = convert(model, seed=0).eval()
    student.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path).eval()
    batch = {k: v for k,v in spoken().items() if k!='labels'}
    with torch.no_grad(): assert torch.equal(again(**batch).last_hidden_state, student(**batch).last_hidden_state)

def test_alignment_brings_the_encoders_mixers_closer():
    model = tiny_whisper()
    student = convert(model, init='attention', seed=0)
    batch = spoken(16)
    rows = [{k: v[i] for k,v in batch.items()} for i in range(16)]
    errors = align(student, model, rows, steps=30, batch=8, calibration=2, use_cpu=True, progress='none')
    assert list(errors.index)==[0,1] and (errors.after<=errors.calibrated).all() and errors.after.mean()<errors.before.mean()

# ---- the packages themselves

def installed(source):
    lacks = [m for m in (source.module,*source.needs) if importlib.util.find_spec(m) is None]
    if lacks: pytest.skip(f"{', '.join(lacks)} is not installed (extra `{source.extra}`)")

def test_whisper_transcribes_recorded_speech():
    installed(sources.WHISPER)
    import jiwer, pandas as pd, soundfile
    from transformers import AutoProcessor
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    folder = data_folder('librispeech_small')
    rows = pd.read_csv(folder/'test-other_transcripts.tsv', sep='\t').iloc[[0,35,72]]
    processor = AutoProcessor.from_pretrained(whisper())
    model = load_pretrained(AutoModelForSpeechSeq2Seq, whisper()).eval()
    assert {p.dtype for p in model.parameters()}=={torch.float32}
    sound = [soundfile.read(folder/p)[0] for p in rows.path]
    features = processor.feature_extractor(sound, sampling_rate=16000, return_tensors='pt').input_features
    said = processor.tokenizer.batch_decode(model.generate(features), skip_special_tokens=True)
    normal = EnglishTextNormalizer({})
    assert jiwer.wer(list(map(normal, rows.transcript)), list(map(normal, said)))<.1

def test_smollm2_is_a_plain_language_model():
    installed(sources.SMOLLM2)
    model = load_pretrained(AutoModelForCausalLM, smollm2())
    assert sum(p.numel() for p in model.parameters())==134_515_008 and model.lm_head.weight is model.model.embed_tokens.weight
    assert 'quantization_config' not in model.config.to_dict() and model.config.model_type=='llama'
