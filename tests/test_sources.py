"Tests that the notebook 10b_speech_source cannot hold: plain references, the shipped checkpoint, faults"
import json, math
from dataclasses import replace
import numpy as np, pytest, torch
from transformers import Wav2Vec2ForCTC, Wav2Vec2ForSequenceClassification, Wav2Vec2Model
import cald.pretrain.speech as S, cald.pretrain.units as U
from cald.pretrained import shipped
from cald.files import hash_files
from cald.data.speech import cnn_frames
from cald.pretrain.loop import load_training,optimiser,read_log
from cald.pretrain.speech import build_model,draw_batch,pretrain_speech,PretrainRecipe
from cald.tasks.front_end import front_end
from cald.pretrain.units import Clusters,label_frames,log_mel,mel_filters,mfcc,span_mask,UnitCorpus
from cald.data.voices import VOICES

def waves(n=12, seed=0):
    rng = np.random.default_rng(seed)
    return [np.clip(.1*np.cumsum(rng.standard_normal(int(rng.uniform(9000,20000)))), -1, 1) for _ in range(n)]

@pytest.fixture(scope='module')
def corpora():
    train,held = UnitCorpus(waves()),UnitCorpus(waves(4, 1))
    c = Clusters(train, 8)
    return label_frames(train, c),label_frames(held, c)

def test_mfcc_by_its_formula():
    "One frame in float64: the Fourier sum, the filters and the cosine sum written out"
    w = np.random.default_rng(0).standard_normal(2000)
    i,n = 3,np.arange(400)
    y = w-.97*np.concatenate([[0.],w[:-1]])
    seg = y[i*320:i*320+400]*(.54-.46*np.cos(2*np.pi*n/399))
    power = np.array([abs((seg*np.exp(-2j*np.pi*k*n/512)).sum())**2 for k in range(257)])
    mel = np.log(mel_filters()@power+1e-6)
    np.testing.assert_allclose(log_mel(w)[i], mel, rtol=1e-9)
    j = np.arange(40)
    c = np.array([(mel*np.cos(np.pi*q*(2*j+1)/80)).sum()*math.sqrt((1 if q==0 else 2)/40) for q in range(13)])
    np.testing.assert_allclose(mfcc(w)[i,:13], c, rtol=1e-9, atol=1e-9)

def test_crops_and_targets_are_aligned():
    "Samples that count up and units that count frames: each unit must stand where its frame starts"
    n = 320*60+80
    c = UnitCorpus([np.arange(n)/40000]*3)
    c.units = [np.stack([np.arange(cnn_frames(n))]*2, 1)]*3
    r = PretrainRecipe.tiny(noise=0., crop=(.3,.5), seconds=2.)
    starts = set()
    for step in range(5):
        b = draw_batch(c, r, step)
        assert b['valid'].all() and cnn_frames(b['x'].shape[1])==b['units'].shape[1]
        raw = np.arange(n)
        for x,u in zip(b['x'].numpy(), b['units'].numpy()):
            start = int(u[0,0])*320; starts.add(start)
            want = raw[start:start+len(x)]
            np.testing.assert_allclose(x, (want-want.mean())/want.std(), atol=1e-2)
            assert (np.diff(u[:,0])==1).all()
    assert len(starts)>5

def test_short_utterances_are_padded_and_not_counted(corpora):
    c = UnitCorpus([waves()[0][:3000]]*2)
    label_frames(c, Clusters(c, 4, n=8))
    r = PretrainRecipe.tiny(crop=(.5,), clusters=4)
    b = draw_batch(c, r, 0)
    assert b['valid'].sum(1).tolist()==[cnn_frames(3000)]*len(b['x'])
    net = build_model(r)
    other = {**b, 'units':torch.where(b['valid'][...,None], b['units'], 3)}
    assert net(**b)['loss'].item()==net(**other)['loss'].item()

def test_masked_frames_come_in_spans():
    m = span_mask(np.random.default_rng(0), 200, 50, .1, 5)
    for row in m: # every stretch of masked frames is as long as a span, if it does not end with the row
        edges = np.flatnonzero(np.diff(np.concatenate([[0],row.astype(int),[0]])))
        assert all(b-a>=5 or b==50 for a,b in zip(edges[::2], edges[1::2]))
    assert span_mask(np.random.default_rng(0), 3, 4, 0., 8).any(1).all() # a row shorter than a span

def test_interrupted_run_equals_the_whole_one(corpora, tmp_path):
    train,held = corpora
    r = PretrainRecipe.tiny(steps=8)
    whole = pretrain_speech(r, train, held, tmp_path/'a', every=4)
    def die(net, row): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): pretrain_speech(r, train, held, tmp_path/'b', every=4, each=die)
    (tmp_path/'b'/'state.safetensors.tmp').write_bytes(b'half a file')
    again = pretrain_speech(r, train, held, tmp_path/'b', every=4)
    for k,v in whole.state_dict().items(): assert torch.equal(v, again.state_dict()[k]), k
    assert [(a['step'],a['loss']) for a in read_log(tmp_path/'a'/'log.csv')]==[(a['step'],a['loss']) for a in read_log(tmp_path/'b'/'log.csv')]

def test_a_run_stopped_by_the_clock_resumes(corpora, tmp_path):
    train,held = corpora
    r = PretrainRecipe.tiny(steps=4)
    pretrain_speech(r, train, held, tmp_path, max_seconds=0.)
    net = build_model(r); step,seconds = load_training(tmp_path/'state.safetensors', net, optimiser(net, r))
    assert step==1 and seconds>0
    pretrain_speech(r, train, held, tmp_path)
    assert [a['step'] for a in read_log(tmp_path/'log.csv')]==[1,4]

def test_it_learns(corpora, tmp_path):
    train,held = corpora
    r = PretrainRecipe.tiny(steps=60, lr=5e-3, noise=0.)
    before,after = S.evaluate(build_model(r), held, r),S.evaluate(pretrain_speech(r, train, held, tmp_path), held, r)
    assert after['held_seen']<before['held_seen']-.2

def test_only_training_voices_are_heard(monkeypatch):
    heard = []
    class Fake:
        def __call__(self, text, voice, *args): heard.append(voice); return np.sin(np.arange(8000)/9.).astype(np.float32)
    monkeypatch.setattr(U, 'Espeak', Fake)
    U.speak(120)
    others = {v.name for split in ('dev','test') for v in VOICES[split]}
    assert heard and not {v.name for v in heard}&others

def test_bad_corpora():
    with pytest.raises(ValueError, match='no utterances'): UnitCorpus([])
    with pytest.raises(ValueError, match='utterance 1 is shorter than two frames'): UnitCorpus([np.zeros(5000),np.zeros(700)])
    with pytest.raises(ValueError, match='utterance 0 has samples that are not finite'): UnitCorpus([np.full(5000, np.inf)])
    with pytest.raises(ValueError, match='differ in length'): UnitCorpus([np.zeros(5000)], [np.zeros(5001)])

def test_shipped_checkpoint():
    folder = shipped()
    about = json.loads((folder/'provenance.json').read_text())
    assert {p.name for p in folder.iterdir()}>={'config.json','model.safetensors','preprocessor_config.json','provenance.json','log.csv'}
    assert (folder/'model.safetensors').stat().st_size<8.2e6 and hash_files(folder/'model.safetensors')==about['weights']
    assert not set(about['voices'])&{v.name for s in ('dev','test') for v in VOICES[s]}
    for cls,head in ((Wav2Vec2Model,set()),(Wav2Vec2ForCTC,{'lm_head'}),(Wav2Vec2ForSequenceClassification,{'projector','classifier'})):
        _,info = cls.from_pretrained(folder, output_loading_info=True)
        assert {k.split('.')[0] for k in info['missing_keys']}==head and not info['unexpected_keys']
    model = Wav2Vec2Model.from_pretrained(folder)
    assert model.num_parameters()==about['parameters'] and all(p.isfinite().all() for p in model.parameters())
    assert model.config.do_stable_layer_norm and model.config.feat_extract_norm=='layer' and model.config.conv_bias
    x = torch.randn(2, 5000)
    torch.testing.assert_close(front_end(model.feature_extractor, x), model.feature_extractor(x), rtol=1e-3, atol=1e-4)

def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="no source 'base' in the package; it has: .*wav2vec2-demo"): shipped('base')

def test_no_file_reaches_the_shipped_folder_half_written(corpora, tmp_path, monkeypatch):
    "A failure while the weights are written leaves the old checkpoint as it was"
    r = PretrainRecipe.tiny()
    S.save_source(build_model(r).model, tmp_path)
    old = hash_files(tmp_path/'model.safetensors')
    model = build_model(replace(r, seed=1)).model
    def broken(self, folder): raise OSError('disk full')
    monkeypatch.setattr(S.Wav2Vec2FeatureExtractor, 'save_pretrained', broken)
    with pytest.raises(OSError, match='disk full'): S.save_source(model, tmp_path)
    assert hash_files(tmp_path/'model.safetensors')==old
