"Speech data: tests that the notebooks 04f to 04i cannot hold"
import gzip, json, os, re, signal, subprocess, sys, time
from dataclasses import astuple
from pathlib import Path

import numpy as np, pandas as pd, pytest, soundfile as sf

pytest.importorskip('espeakng_loader', reason='generated speech needs the package espeakng-loader')
import cald.data.commands, cald.data.speech, cald.data.voices
from cald.data.commands import INTENTS,partition,plan_recordings,SPLIT_SIZES,vocabulary,voices_of
from cald.data.corpora import digits_manifest,read_slurp
from cald.data.tables import DataError
from cald.data.speech import (check_manifest,cnn_frames,corpus_parameters,generate,load_audio,manifest,
                              MANIFEST_COLUMNS,manifest_hash,needed_frames,read_manifest,VOCAB,write_manifest)
from cald.data.voices import (draw_room,Espeak,record,run_jobs,SAMPLE_RATE,speak_and_record,Voice,VOICES,
                              write_shard)
from common import BARE,data_folder

TREE = Path(__file__).parent.parent
FEW = dict(train=54, dev=9, test=14, dev_seen=6, test_seen=6)
ENV = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(TREE), os.environ.get('PYTHONPATH', '')])}

def python(code):
    "A process that runs `code` as a script without a main guard"
    return subprocess.Popen([sys.executable, '-c', code], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

@pytest.fixture(scope='session')
def corpus(tmp_path_factory): return generate(tmp_path_factory.mktemp('speech'), FEW, workers=2)

@pytest.fixture
def tone(tmp_path):
    sf.write(tmp_path/'ok.wav', .1*np.sin(np.arange(SAMPLE_RATE)/5), SAMPLE_RATE)
    return tmp_path

# ---- voices

def test_every_voice_is_the_same_in_any_order_and_process(tmp_path):
    "A library that kept state, or used the address of something, would be caught here"
    voices = [v for vs in VOICES.values() for v in vs]
    jobs = [(str(tmp_path/f'{i}.flac'), list(astuple(v)), ['what is the price of this violin'], [[0,i]]) for i,v in enumerate(voices)]
    here = [sha for _,sha in run_jobs(jobs, 0)]
    there = [sha for _,sha in run_jobs(jobs[::-1], 1)][::-1]
    assert [v.name for v,a,b in zip(voices, here, there) if a!=b] == []
    assert len(set(here))==len(here)

def test_voices_are_disjoint_and_families_do_not_straddle():
    side = {v.variant: part for part,vs in VOICES.items() for v in vs}
    assert len(side)==sum(map(len, VOICES.values())) and len(VOICES['train'])>=48
    for family in (r'm\d', r'f\d', r'klatt\d', r'robosoft\d?', r'iven\d?', r'steph\d?', r'RicishayMax\d?', r'edward\d?', r'rob(ert)?'):
        assert len({p for v,p in side.items() if re.fullmatch(family, v)})==1, family
    assert {v.accent for v in VOICES['dev']+VOICES['test']} <= {v.accent for v in VOICES['train']}

def test_every_voice_speaks(tmp_path):
    e = Espeak()
    for v in (v for vs in VOICES.values() for v in vs):
        x = e('turn on the lights in the kitchen', v)
        assert 1<len(x)/SAMPLE_RATE<3.5 and .03<np.abs(x).max()<1, v

def test_rooms_do_not_depend_on_the_speaker():
    a = draw_room(np.random.default_rng([0,1,0,5]))
    assert a==draw_room(np.random.default_rng([0,1,0,5]))
    assert a!=draw_room(np.random.default_rng([0,1,0,6]))

@pytest.mark.parametrize('n', [1, 159, 160, 4001])
def test_record_takes_short_waves(n):
    rng = np.random.default_rng(0)
    x = record(rng.standard_normal(n).astype(np.float32), draw_room(rng), rng)
    assert x.dtype==np.float32 and np.isfinite(x).all() and np.abs(x).max()<=.96

def test_missing_espeak_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'espeakng_loader', None)
    with pytest.raises(ImportError, match='pip install espeakng-loader'): Espeak()

def test_the_worker_needs_neither_the_package_nor_torch():
    "Otherwise each process would import torch and transformers first"
    code = (f"import importlib.util,sys; s = importlib.util.spec_from_file_location('w', {str(cald.data.voices.__file__)!r}); m = sys.modules['w'] = "
            "importlib.util.module_from_spec(s); s.loader.exec_module(m); print('torch' in sys.modules, 'cald' in sys.modules)")
    assert python(code).communicate(timeout=120)[0].split()==['False','False']

def test_a_failing_job_raises_and_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match='espeak-ng has no Voice'):
        run_jobs([(str(tmp_path/'a.flac'), ['xx','m1',50], ['go'], [[0,0]])], 2)
    assert list(tmp_path.iterdir())==[]

# ---- the language

def test_the_plan_of_the_demo_keeps_its_promises():
    p = plan_recordings(SPLIT_SIZES)
    texts,speakers = p.groupby('split').text.agg(set),p.groupby('split').speaker.agg(set)
    assert all(partition(t)==s.partition('_')[0] for t,s in zip(p.text, p.split))
    assert not any(texts[s] & texts.train for s in texts.index if s!='train')
    assert not speakers.dev & speakers.train and not speakers.test & (speakers.train|speakers.dev)
    assert speakers.test_seen==speakers.dev_seen==speakers.train and len(speakers.train)>=40
    assert p.scenario.nunique()>=8 and p.action.nunique()>=12
    assert 300<=len(set(' '.join(p.text).split()))<=700
    assert set(''.join(p.text))<=set(VOCAB)
    assert p.text.map(lambda t: 3<=len(t.split())<=10).all()
    for s in ('dev','test'): assert set(zip(p.scenario[p.split==s], p.action[p.split==s])) <= set(zip(p.scenario[p.split=='train'], p.action[p.split=='train']))
    heard = set(' '.join(texts.train).split())
    assert np.mean([w not in heard for t in texts.test for w in t.split()])<.002

def test_a_text_has_one_intent():
    rng,meant = np.random.default_rng(1),{}
    for _ in range(6000):
        text,*intent = cald.data.commands.sentence(rng, ['train','dev','test'][rng.integers(3)])
        assert meant.setdefault(text, intent)==intent, text

def test_pretraining_hears_no_test_voice_or_sentence():
    p,demo = plan_recordings(dict(train=3000), seed=1000, salad=.3),plan_recordings(SPLIT_SIZES)
    held = demo[~demo.split.isin(['train'])]
    assert not set(p.text)&set(held.text)
    assert not set(p.speaker)&set(demo.speaker[demo.split.isin(['dev','test'])])
    assert set(' '.join(p.text).split())<=set(vocabulary())

# ---- the corpus

def test_generation_does_not_depend_on_the_number_of_processes(corpus, tmp_path):
    other = generate(tmp_path, FEW, workers=0)
    assert manifest_hash(other)==manifest_hash(corpus)
    for c in MANIFEST_COLUMNS: assert c in ('audio','where') or other[c].equals(corpus[c]), c
    info = [json.loads((Path(d.audio[0]).parent/'corpus.json').read_text()) for d in (corpus,other)]
    assert info[0]==info[1]

def test_an_utterance_can_be_made_alone(corpus):
    for i in (0,60,len(corpus)-1):
        r,p = corpus.iloc[i],plan_recordings(FEW).iloc[i]
        x = speak_and_record(Espeak(), r.text, voices_of(r.split)[p.voice], [0, 1, list(SPLIT_SIZES).index(r.split), int(p.number)])
        assert np.abs(load_audio(r.audio, r.start, r.stop)-x).max()<1e-4

def test_corpus_is_usable(corpus):
    for task in ('asr','speaker'): assert len(check_manifest(corpus, task)[1])==0
    assert .5<corpus.seconds.min() and corpus.seconds.max()<6 and 1.4<corpus.seconds.mean()<2.4
    peaks = 20*np.log10([np.abs(load_audio(r.audio, r.start, r.stop)).max() for r in corpus.itertuples()])
    assert peaks.min()>-21 and peaks.max()<0 and peaks.std()>4

def test_killed_generation_starts_again(corpus, tmp_path):
    "kill -9 in the middle: no corpus.json, no half file under its final name, and the next call gives the same corpus"
    p = python(BARE+f"from cald.data.speech import generate; generate({str(tmp_path)!r}, {FEW}, workers=1)")
    home,t = tmp_path/f"espeak-{corpus_parameters(FEW, 0, 0.)['key']}",time.time()
    while not list(home.glob('*.flac')) and time.time()-t<120 and p.poll() is None: time.sleep(.02)
    os.kill(p.pid, signal.SIGKILL); p.communicate()
    assert not (home/'corpus.json').exists(), 'it had ended before it was killed'
    for f in home.glob('*.flac'): sf.info(f)
    again = generate(tmp_path, FEW, workers=2)
    assert manifest_hash(again)==manifest_hash(corpus) and len(check_manifest(again, 'asr')[1])==0

def test_two_at_once_and_no_main_guard(corpus, tmp_path):
    code = BARE+f"from cald.data.speech import generate,manifest_hash; print(manifest_hash(generate({str(tmp_path)!r}, {FEW}, workers=1)))"
    both = [python(code) for _ in range(2)]
    out = [p.communicate(timeout=240) for p in both]
    assert [o.strip() for o,_ in out]==[manifest_hash(corpus)]*2, out[0][1][-500:]+out[1][1][-500:]
    home = Path(generate(tmp_path, FEW).audio[0]).parent
    assert [f.name for f in home.iterdir() if f.name.endswith('.tmp')]==[]

def test_key_follows_everything(monkeypatch):
    def key(sizes=FEW, seed=0, salad=0.): return corpus_parameters(sizes, seed, salad)['key']
    first = key()
    assert len({first, key(seed=1), key(salad=.1), key(dict(FEW, dev=10))})==4
    with monkeypatch.context() as m:
        m.setitem(INTENTS, ('alarm','set'), ['set an alarm'])
        assert key()!=first
    with monkeypatch.context() as m:
        m.setitem(VOICES, 'dev', VOICES['dev'][:-1])
        assert key()!=first
    with monkeypatch.context() as m:
        m.setattr(cald.data.speech, 'GENERATOR', 99)
        assert key()!=first
    assert key()==first

# ---- manifests

@pytest.mark.parametrize('kind', ['tsv', 'csv', 'jsonl', 'tsv.gz', 'csv.gz', 'jsonl.gz'])
def test_manifests_name_file_and_row(tone, kind):
    rows = [dict(audio='ok.wav', text='go on', split='train'), dict(audio='gone.wav', text='go', split='dev')]
    sep = '\t' if 'tsv' in kind else ','
    lines = [json.dumps(r) for r in rows] if 'json' in kind else [sep.join(rows[0])]+[sep.join(r.values()) for r in rows]
    path = tone/f'm.{kind}'
    with (gzip.open if kind.endswith('gz') else open)(path, 'wt') as f: f.write('\n'.join(lines)+'\n')
    df = read_manifest(path)
    assert df.text.tolist()==['go on','go'] and Path(df.audio[0])==tone/'ok.wav'
    with pytest.raises(DataError) as e: check_manifest(df, 'asr')
    assert f'{path}, row {len(lines)} (gone.wav): no such file' in str(e.value) and 'drop=True' in str(e.value)
    assert len(e.value.problems)==1

@pytest.mark.parametrize('name,content,message', [('latin.tsv','audio\ttext\na.wav\tcafé\n'.encode('latin-1'),'latin.tsv, row 2: not UTF-8 (byte 0xe9)'),
                                               ('wide.tsv','audio\ttext\n'.encode('utf-16'),'wide.tsv, row 1: not UTF-8 (byte 0xff)'),
                                               ('not.tsv.gz',b'audio\ttext\n','not.tsv.gz: damaged (Not a gzipped file'), ('half.tsv.gz',gzip.compress(b'audio\ttext\n'*9, mtime=0)[:-9],'half.tsv.gz: damaged (')])
def test_a_manifest_that_is_not_text_is_named(tone, name, content, message):
    (tone/name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)): read_manifest(tone/name)

def test_manifest_round_trip(tone):
    df = manifest([dict(id='a', audio=tone/'ok.wav', text="what's up", speaker='é', split='train', start=.1, stop=1/3)])
    write_manifest(df, tone/'sub.tsv')
    back = read_manifest(tone/'sub.tsv')
    assert back.drop(columns='where').equals(df.assign(audio=str(tone/'ok.wav')).drop(columns='where'))

def test_absolute_audio_paths_stay(tone):
    (tone/'m.csv').write_text(f"audio,speaker\n{tone/'ok.wav'},anna\n")
    assert read_manifest(tone/'m.csv').audio[0]==str(tone/'ok.wav')

FAULTS = {
    'no such file': dict(audio='gone.wav'),
    'no audio file named': dict(audio=''),
    'the file holds no samples': dict(audio='empty.wav'),
    'all samples are zero': dict(audio='zero.wav'),
    'samples are not finite': dict(audio='nan.wav'),
    'cannot be read': dict(audio='text.wav'),
    'the transcript is empty': dict(text=''),
    'characters outside the vocabulary: 7': dict(text='go 7'),
    'lower case would do': dict(text='GO'),
    'too short: 49 frames': dict(text='go '*20),
    'is not before stop': dict(start='0.5', stop='0.2'),
    'the row ends at 9 s, the file at 1 s': dict(stop='9'),
    "unknown split 'trian'": dict(split='trian')}

@pytest.mark.parametrize('problem', FAULTS)
@pytest.mark.parametrize('drop', [False, True])
def test_faults(tone, problem, drop, capsys):
    sf.write(tone/'empty.wav', np.zeros(0), SAMPLE_RATE); sf.write(tone/'zero.wav', np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    sf.write(tone/'nan.wav', np.full(SAMPLE_RATE, np.inf), SAMPLE_RATE, subtype='FLOAT'); (tone/'text.wav').write_bytes(b'RIFFnothing')
    good = dict(audio='ok.wav', text='go', split='train', start='', stop='')
    rows = [good, good|FAULTS[problem], good]
    (tone/'m.tsv').write_text('\n'.join(['\t'.join(good)]+['\t'.join(r.values()) for r in rows])+'\n')
    df = read_manifest(tone/'m.tsv')
    if drop:
        kept,left = check_manifest(df, 'asr', drop=True)
        assert kept.index.tolist()==[0,2] and problem in left.problem.iloc[0]
        out = capsys.readouterr().out
        assert '1 of 3 rows' in out and 'left out' in out and problem in out
    else:
        with pytest.raises(DataError, match=re.escape(problem)) as e: check_manifest(df, 'asr')
        assert 'm.tsv, row 3' in str(e.value)

def test_labels(tone):
    labels = [('alarm','set','anna','train'), ('iot','light_on','ben','train'), ('alarm','light_on','ben','dev'), ('alarm','off','carl','test')]
    rows = [dict(audio=tone/'ok.wav', start=.2*i, stop=.2*i+.2, scenario=s, action=a, speaker=p, split=split) for i,(s,a,p,split) in enumerate(labels)]
    df = manifest(rows)
    with pytest.raises(DataError, match="unknown action 'off'"): check_manifest(df, 'intent')
    with pytest.raises(DataError, match="unknown speaker 'carl'"): check_manifest(df, 'speaker')
    assert len(check_manifest(df, 'speaker', labels=dict(speaker={'anna','ben','carl'}))[0])==4
    assert len(check_manifest(df.assign(action=''), 'intent')[0])==4 # intents of one part
    with pytest.raises(DataError, match='no speaker'): check_manifest(df.assign(speaker=''), 'speaker')
    with pytest.raises(DataError): check_manifest(df.assign(audio='gone.wav'), 'asr', drop=True) # nothing would be left

def test_truncated_flac(corpus, tmp_path):
    r = corpus.iloc[0]
    (tmp_path/'half.flac').write_bytes(Path(r.audio).read_bytes()[:300])
    with pytest.raises(DataError, match='half.flac'): check_manifest(corpus.head(1).assign(audio=str(tmp_path/'half.flac')), 'asr')

def test_own_frame_count(tone):
    df = manifest([dict(audio=tone/'ok.wav', text='go on', split='train')])
    with pytest.raises(DataError, match='too short: 4 frames, its transcript needs 5'): check_manifest(df, 'asr', frames=lambda n: n//4000)

def test_frames_agree_with_wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2Model
    model = Wav2Vec2Model(Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(4,)*7,
                                         num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2))
    for n in (400, 719, 720, 16000, 23456): assert cnn_frames(n)==int(model._get_feat_extract_output_lengths(n))
    assert needed_frames('aabb')==6

@pytest.mark.parametrize('subtype', ['PCM_16', 'PCM_24', 'ULAW', 'ALAW'])
def test_sphere(tmp_path, subtype):
    x = .5*np.sin(2*np.pi*300*np.arange(8000)/8000)
    sf.write(tmp_path/'a.sph', np.stack([x,x], 1), 8000, format='NIST', subtype=subtype)
    assert (tmp_path/'a.sph').read_bytes().startswith(b'NIST_1A')
    y = load_audio(tmp_path/'a.sph')
    assert y.shape==(SAMPLE_RATE,) and np.abs(y[500:-500]-.5*np.sin(2*np.pi*300*np.arange(SAMPLE_RATE)/SAMPLE_RATE)[500:-500]).max()<.02

def test_parts_of_a_file_join_up(tmp_path):
    x = np.random.default_rng(0).standard_normal(SAMPLE_RATE).astype(np.float32)*.1
    sf.write(tmp_path/'a.wav', x, SAMPLE_RATE, subtype='FLOAT')
    cuts = [0, .1, .25, .9, 1.]
    assert np.array_equal(np.concatenate([load_audio(tmp_path/'a.wav', a, b) for a,b in zip(cuts, cuts[1:])]), x)
    assert np.array_equal(load_audio(tmp_path/'a.wav', float('nan'), float('nan')), x)

# ---- recorded speech

def test_fsdd(tmp_path):
    connected,speakers = digits_manifest(data_folder('fsdd')/'recordings', tmp_path, held_out='george', sizes=dict(train=20, dev=5, test=10))
    df = check_manifest(read_manifest(connected), 'asr')[0]
    assert set(df.speaker[df.split=='test'])=={'george'} and 'george' not in set(df.speaker[df.split!='test'])
    assert 1<df.seconds.mean()<5
    who = read_manifest(speakers)
    assert who.groupby('split').size().to_dict()==dict(train=2400, dev=300, test=300) and who.speaker.nunique()==6
    assert len(check_manifest(who.groupby('split').head(30), 'speaker', labels=dict(speaker=set(who.speaker)))[1])==0

def test_librispeech_by_manifest(tmp_path):
    folder = data_folder('librispeech_small')
    t = pd.read_csv(folder/'test-other_transcripts.tsv', sep='\t').head(10)
    rows = [json.dumps(dict(audio=str(next(folder.rglob(f'{u}.flac'))), text=x, speaker=str(s))) for u,x,s in zip(t.utt_id, t.transcript, t.speaker)]
    (tmp_path/'m.jsonl').write_text('\n'.join(rows))
    with pytest.raises(DataError, match='lower case would do'): check_manifest(read_manifest(tmp_path/'m.jsonl'), 'asr')
    kept,_ = check_manifest(read_manifest(tmp_path/'m.jsonl', prepare=str.lower), 'asr')
    assert np.allclose(kept.seconds, t.seconds, atol=.02)

def test_slurp_annotations(tmp_path):
    folder = data_folder('slurp_text')
    for name in ('devel','test'): (tmp_path/f'{name}.jsonl').write_bytes((folder/f'{name}.jsonl').read_bytes())
    line = (folder/'devel.jsonl').read_text().splitlines()[0]
    for name in ('train','train_synthetic'): (tmp_path/f'{name}.jsonl').write_text(line.replace('audio-', f'{name}-'))
    df = read_slurp(tmp_path)
    assert df.groupby('split').size().to_dict()==dict(dev=8690, test=13078, train=2*len(json.loads(line)['recordings']))
    assert df.scenario.nunique()==18
    with pytest.raises(DataError, match=r'5 of 5 rows cannot be used.*devel.jsonl, row 1 \(audio-\d+.*no such file'.replace('.*', '[^~]*')):
        check_manifest(df[df.split=='dev'].head(5), 'intent')
    (tmp_path/'train.jsonl').write_text('')
    with pytest.raises(DataError, match='train.jsonl is empty'): read_slurp(tmp_path)

# ---- manifests of a user

def test_a_wav_file_that_was_cut_short_is_named(tone):
    data = (tone/'ok.wav').read_bytes()
    (tone/'part.wav').write_bytes(data[:len(data)//2])
    (tone/'m.tsv').write_text('audio\ttext\tsplit\n'+''.join(f'{name}.wav\tgo\ttrain\n' for name in ('ok','part')))
    with pytest.raises(DataError, match='row 3 .part.wav.: the file was cut short'): check_manifest(read_manifest(tone/'m.tsv'), 'asr')

def test_any_word_is_an_intent(tone):
    rows = [dict(audio='ok.wav', intent=i, split='train') for i in (0,'light_on','stop')]
    (tone/'m.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    df = read_manifest(tone/'m.jsonl')
    assert df.scenario.tolist()==['0','light_on','stop'] and not any(df.action)
    assert len(check_manifest(df, 'intent')[0])==3

def test_an_intent_that_is_heard_once_stays_in_training(tone):
    rows = [dict(audio='ok.wav', label='often') for _ in range(30)]+[dict(audio='ok.wav', label=f'once {i}') for i in range(10)]
    (tone/'m.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    df = read_manifest(tone/'m.jsonl')
    assert set(df.split[df.scenario!='often'])=={'train'} and {'dev','test'}<=set(df.split)
