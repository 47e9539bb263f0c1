"Speech experiments: what must not change between two ways of doing the same, and what must stop before training."
import tracemalloc
import json, re, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest, soundfile as sf, torch, torch.nn.functional as F
from transformers import (pipeline, Trainer, Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC,
                          Wav2Vec2ForSequenceClassification, Wav2Vec2Processor)
from cald.guidance import Unguided
from cald.lab.grid import cell,run_key,settings
from cald.lab.queue import helper_processes,train_as_helper
from cald.lab.store import Store
from cald.lab.recipe import MODES
from cald.data.tables import DataError
from cald.tasks.speech import SPEECH_TASKS as TASKS
from cald.paper.table3 import smoke_wav2vec2,Speech
from cald.tasks.corpora import make_corpus,read_data
from cald.tasks.speech import collate_speech,load_trained,predict_speech,seconds_of
from common import check_interrupted, train

exp = Speech()
WORDS = 'one two three four five six seven eight nine'.split()

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "A manifest of tones: each word has a pitch, each speaker a level; and the corpora of all tasks"
    home,rng,rows = tmp_path_factory.mktemp('tones'),np.random.default_rng(0),[]
    for i in range(36):
        say = [WORDS[j] for j in rng.integers(len(WORDS), size=2)]
        t = np.arange(8000+400*(i%5))/16000
        wave = np.sin(2*np.pi*t*(200+60*WORDS.index(say[0])))*(.2+.2*(i%3))
        sf.write(home/f'{i}.wav', wave, 16000)
        rows.append(dict(audio=f'{i}.wav', text=' '.join(say), scenario=say[0][0], action=str(i%2), speaker=f's{i%3}', split=['train','train','dev','test'][i//9]))
    df = pd.DataFrame(rows)
    classes = df.scenario.isin(set(df.scenario[df.split=='train']))
    df[classes].to_csv(home/'manifest.tsv', sep='\t', index=False)
    source = smoke_wav2vec2(home)
    return home,source,exp.read(list(TASKS), source, home/'cache', str(home/'manifest.tsv'), scale='smoke')

@pytest.mark.parametrize('mode', MODES[1:])
def test_an_interrupted_run_gives_the_model_of_an_uninterrupted_one(data, tmp_path, mode, monkeypatch):
    home,source,corpora = data
    (_,first),*_,(_,c) = exp.grid(['asr'], ['standard',mode], [0], source, 'smoke', steps=4, evals=4)
    check_interrupted(exp, first, c, corpora['asr'], tmp_path, monkeypatch)

def test_every_task_trains_and_its_saved_model_predicts_the_same(data, tmp_path):
    home,source,corpora = data
    store = Store(tmp_path)
    for t,corpus in corpora.items():
        for _,c in exp.grid([t], ['target'], [0], source, 'smoke', steps=2): run = train(exp, store, c, corpus)
        part = corpus.part(TASKS[t], 'test')
        again = load_trained(run.folder/'model')
        assert predict_speech(again, part)[0]==predict_speech(load_trained(run.folder/'model'), part)[0]
        assert type(again).__name__.startswith('Cald') and 0<=run.result[TASKS[t].metric]

@pytest.mark.parametrize('mode', MODES[1:])
def test_every_mode_trains_with_the_papers_loss(data, tmp_path, mode):
    "As at paper scale, where the loss is a sum over the label characters of the step"
    home,source,corpora = data
    store = Store(tmp_path)
    for t in ('asr','speaker') if mode=='target' else ('intent',):
        for _,c in exp.grid([t], ['standard',mode], [0], source, 'smoke', steps=2, loss='paper-speech', accumulate=2): run = train(exp, store, c, corpora[t])
        assert 0<=run.result[TASKS[t].metric]

@pytest.mark.parametrize('task', TASKS)
def test_the_papers_task_loss_is_a_sum_divided_by_characters(data, tmp_path, task):
    "In the reference a speaker's transcript is '123'. One step, at rate 0, of a batch of all that there is"
    home,source,corpora = data
    store,ds = Store(tmp_path),corpora[task].part(TASKS[task], 'train')
    own = dict(steps=1, evals=1, batch=len(ds), loss='paper-speech', lr_student=0., dropout=0., mask_time=0.)
    for _,c in exp.grid([task], ['standard','target'], [0], source, 'smoke', **own): run = train(exp, store, c, corpora[task])
    model,losses = load_trained(run.folder/'model').eval(),[]
    for i in range(len(ds)):
        b = collate_speech([ds[i]])
        with torch.no_grad(): out,y = model(input_values=b['input_values'], attention_mask=b['attention_mask']).logits[0].log_softmax(-1),b['labels'][0]
        n = model._get_feat_extract_output_lengths(b['attention_mask'].sum(1))
        if task=='asr': losses.append(F.ctc_loss(out[:n], y, n, torch.tensor([len(y)]), reduction='sum').item())
        else: losses.append(-sum(p.log_softmax(-1)[k].item() for p,k in zip(out.split(ds.labels.sizes), y))/len(y))
    assert run.metrics().loss_task.dropna().item()==pytest.approx(sum(losses)/sum(3 if task=='speaker' else len(t) for t in ds.df.text), rel=2e-3) # the last dropout of a Wav2Vec2 stays

def test_a_student_without_its_teacher_says_so(data, tmp_path):
    home,source,corpora = data
    with pytest.raises(RuntimeError, match='is not trained yet'):
        exp.train_cell(cell('asr', source=source, mixer='mamba2', mode='target', scale='smoke'), None, corpora['asr'], Store(tmp_path))

def test_the_teacher_of_a_cell_has_its_own_settings(data, tmp_path):
    "A guided run of other settings must not be taught by the standard run of the default ones"
    home,source,corpora = data
    store = Store(tmp_path)
    a,b = (cell('asr', source=source, mixer='mamba2', mode='target', scale='smoke', steps=n) for n in (2,3))
    train(exp, store, exp.grid(['asr'], [], [0], source, 'smoke', steps=2)[0][1], corpora['asr'])
    assert exp.standard_run(a, store, corpora['asr']).done
    with pytest.raises(RuntimeError): exp.standard_run(b, store, corpora['asr'])
    assert run_key(a, 'x')!=run_key(b, 'x')!=run_key(b, 'y')

def test_what_only_students_have_does_not_train_another_teacher():
    what = dict(source='x', scale='smoke', steps=7, alpha=3., lr_student=.1, steps_student=5)
    student = cell('asr', mixer='mamba2', mode='target', **what)
    assert exp.standard_cell(student)==cell('asr', mixer='softmax', mode='standard', source='x', scale='smoke', steps=7)
    assert [c for _,c in exp.grid(['asr'], ['target'], [0], **what)]==[exp.standard_cell(student),student]

def test_a_student_takes_its_own_number_of_steps_and_all_its_waypoints(data, tmp_path):
    home,source,corpora = data
    store = Store(tmp_path)
    for _,c in exp.grid(['asr'], ['waypoint'], [0], source, 'smoke', steps=6, steps_student=4, evals=2): run = train(exp, store, c, corpora['asr'])
    assert run.metrics().step.max()==4
    assert run.metrics().waypoint.dropna().tolist()==[3,6]

def test_mixers_may_begin_with_attentions_projections_of_the_teacher(data, tmp_path):
    home,source,corpora = data
    store,cells = Store(tmp_path),{}
    for how in ('shape','weights'): (_,first),(_,cells[how]) = exp.grid(['asr'], ['target'], [0], source, 'smoke', steps=2, reuse=how)
    teacher = load_trained(train(exp, store, first, corpora['asr']).folder/'model').base_model.encoder.layers[0].attention
    for how,c in cells.items():
        run = train(exp, store, c, corpora['asr'])
        student = exp.ready(c, exp.recipe(**run.settings), exp.labels(corpora['asr'], TASKS['asr']), store.run(first, corpora['asr'].hash).folder)[0]
        mixer = student.base_model.encoder.layers[0].attention.mixer.bw
        keys = mixer.in_proj.weight[2*mixer.d_inner:3*mixer.d_inner] # those that make B
        assert keys.shape==teacher.k_proj.weight.shape and torch.equal(keys, teacher.k_proj.weight)==(how=='weights')

def test_a_helper_trains_cells_of_the_same_grid(data, tmp_path, monkeypatch):
    home,source,corpora = data
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parents[1]))
    store = Store(tmp_path, exp.modules)
    data_args = dict(tasks=['asr'], source=source, cache=str(home/'cache'), data=str(home/'manifest.tsv'), scale='smoke')
    grid_args = dict(tasks=['asr'], modes=['target','unguided'], seeds=[0,1], source=source, scale='smoke', steps=2)
    with helper_processes(1, 'cald.lab.queue:train_as_helper', tmp_path, experiment='cald.paper.table3:Speech', data_args=data_args, grid_args=grid_args, runs=str(tmp_path)) as procs:
        procs[0].wait(timeout=240)                       # here it does all of the work
    assert procs[0].returncode==0, (tmp_path/'helper-1.log').read_text()
    results = exp.train(data_args, grid_args, corpora, store)
    assert len(results)==6 and all(len(r.sessions)==1 for r in store.runs())
    assert {s['pid'] for r in store.runs() for s in r.sessions}=={procs[0].pid}

@pytest.mark.parametrize('wrong,message', [
    (dict(text='naïve'), 'characters outside'), (dict(text=''), 'empty'), (dict(text='a very long transcript '*9), 'too short'), (dict(audio='gone.wav'), 'gone.wav')])
def test_a_bad_row_stops_everything_before_training_and_is_named(data, tmp_path, wrong, message):
    home,source,_ = data
    df = pd.read_csv(home/'manifest.tsv', sep='\t', dtype=str)
    for k,v in wrong.items(): df.loc[3,k] = v
    df.to_csv(home/'wrong.tsv', sep='\t', index=False)
    with pytest.raises(DataError, match=message) as e: make_corpus(read_data(str(home/'wrong.tsv'), 'asr', tmp_path), TASKS['asr'], source, tmp_path)
    assert 'row 5' in str(e.value)
    kept = make_corpus(read_data(str(home/'wrong.tsv'), 'asr', tmp_path), TASKS['asr'], source, tmp_path, drop=True)
    assert len(kept.df)==len(df)-1 and len(kept.left_out)==1

def test_data_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'): read_data(str(tmp_path/'none'), 'asr', tmp_path)
    with pytest.raises(ValueError, match='needs data'): read_data('', 'asr', tmp_path, 'paper')

# ---- a checkpoint of the user's own

VOCAB = ['<pad>','<s>','</s>','<unk>','|',*"ETAONIHSRDLUMWCFGYPBVK'XJQZ"] # as in wav2vec2-base-960h

@pytest.fixture(scope='module')
def recogniser(data):
    "A CTC checkpoint with 32 characters, upper case, and the group norm of wav2vec2-base"
    folder = data[0]/'recogniser'
    folder.mkdir()
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,)*7,
                 num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=32, pad_token_id=0, feat_extract_norm='group', **sizes)).save_pretrained(folder)
    (folder/'vocab.json').write_text(json.dumps({c: i for i,c in enumerate(VOCAB)}))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(folder/'vocab.json')).save_pretrained(folder)
    return str(folder)

def trained(own, data_args, modes, folder):
    "The results of one seed of two steps, trained by a helper, and the folders of their models"
    grid_args = dict(tasks=data_args['tasks'], modes=modes, seeds=[0], source=data_args['source'], scale='smoke', steps=2, steps_student=2)
    train_as_helper('cald.paper.table3:Speech', data_args, grid_args, folder, own=own.own, teacher=own.teacher)
    corpora,store = own.read(**data_args),Store(folder, own.modules)
    results = own.train(data_args, grid_args, corpora, store)
    assert all(len(r['sessions'])==1 for r in results.record), 'the helper has trained them'
    return results,[store.behind(r).folder/'model' for r in results.record],corpora

def test_a_recogniser_with_its_own_vocabulary_is_the_standard_model(data, recogniser, tmp_path):
    home,*_ = data
    own = Speech(dict(name='calls', kind='asr'), recogniser)
    data_args = dict(tasks=['calls'], source=recogniser, cache=str(tmp_path), data=str(home/'manifest.tsv'), scale='smoke', normalise='upper')
    results,folders,corpora = trained(own, data_args, ['standard','target','waypoint'], tmp_path/'runs')
    assert results.row.tolist()==['standard','target']
    theirs,ours = (load_trained(f).state_dict() for f in (recogniser, folders[0]))
    assert all(torch.equal(theirs[n], ours[n]) for n in theirs if 'masked_spec_embed' not in n)
    part = corpora['calls'].part(own.tasks['calls'], 'test')
    assert part.labels.encode('AT')==[VOCAB.index(c) for c in 'AT'] and len(part.labels)==32
    assert part.labels.decode(part.labels.encode('A TEA'))=='A TEA' and part.labels.decode([1,5,2,3])=='E'
    recognise = pipeline('automatic-speech-recognition', recogniser)
    predicted,_ = predict_speech(load_trained(recogniser), part)
    theirs = [recognise(sf.read(a, dtype='float32')[0])['text'] for a in part.df.audio]
    assert predicted==[re.sub('<[^>]*>', '', text).strip() for text in theirs], 'decoded as by transformers, without its </s>'
    student = load_trained(folders[1])
    assert student.lm_head.out_features==32 and type(student).__name__=='CaldWav2Vec2ForCTC'
    text = pipeline('automatic-speech-recognition', str(folders[1]))(sf.read(part.df.audio[0], dtype='float32')[0])['text']
    assert set(re.sub('<[^>]*>', '', text))<=set(''.join(VOCAB[4:]).replace('|', ' '))

def test_a_recogniser_lends_its_encoder_to_a_task_with_other_characters(data, recogniser, tmp_path):
    home,*_ = data
    data_args = dict(tasks=['asr'], source=recogniser, cache=str(tmp_path), data=str(home/'manifest.tsv'), scale='smoke')
    results,folders,_ = trained(Speech(), data_args, ['standard','target'], tmp_path/'runs')
    assert [load_trained(f).config.vocab_size for f in folders]==[29,29] and not results.wer.isna().any()
    classes = trained(Speech(), {**data_args, 'tasks':['speaker']}, ['standard'], tmp_path/'runs')[1]
    assert load_trained(classes[0]).config.id2label=={0:'s0', 1:'s1', 2:'s2'}

@pytest.mark.parametrize('kind', ['speaker','intent'])
def test_a_classifier_with_its_own_classes_is_the_standard_model(data, tmp_path, kind):
    home,source,_ = data
    df = pd.read_csv(home/'manifest.tsv', sep='\t', dtype=str)
    names = ['s2','s0','s1'] if kind=='speaker' else sorted(set(df.scenario+'_'+df.action), reverse=True)
    config = Wav2Vec2Config.from_pretrained(source, id2label=dict(enumerate(names)), classifier_proj_size=16)
    torch.manual_seed(0)
    Wav2Vec2ForSequenceClassification(config).save_pretrained(tmp_path/'teacher')
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path/'teacher')
    own = Speech(dict(name='calls', kind=kind), str(tmp_path/'teacher'))
    data_args = dict(tasks=['calls'], source=own.teacher, cache=str(tmp_path), data=str(home/'manifest.tsv'), scale='smoke')
    results,folders,corpora = trained(own, data_args, ['standard','target'], tmp_path/'runs')
    part = corpora['calls'].part(own.tasks['calls'], 'test')
    classify = pipeline('audio-classification', own.teacher)
    found = [classify(sf.read(a, dtype='float32')[0], top_k=1)[0]['label'] for a in part.df.audio]
    true = part.df.speaker if kind=='speaker' else part.df.label
    assert results.joint[0]==pytest.approx(100*np.mean([a==b for a,b in zip(found, true)]))
    assert load_trained(folders[1]).config.id2label==dict(enumerate(names))

def test_a_model_of_two_parts_comes_back_as_a_teacher(data, tmp_path):
    "An intent has two parts in a model of this library: both are named in its configuration"
    home,source,_ = data
    data_args = dict(tasks=['intent'], source=source, cache=str(tmp_path), data=str(home/'manifest.tsv'), scale='smoke')
    _,(folder,),corpora = trained(Speech(), data_args, ['standard'], tmp_path/'runs')
    again = Speech(teacher=str(folder))
    labels = again.read(**{**data_args, 'source':str(folder)})['intent'].part(again.tasks['intent'], 'train').labels
    assert labels.classes==corpora['intent'].part(TASKS['intent'], 'train').labels.classes

@pytest.mark.parametrize('fault,message', [
    ('case', r'row 2.*upper case would do(.|\n)*vocabulary is that of the teacher .*recogniser: '),
    ('vocabulary', 'broken: its head has 32 characters, but its tokenizer .vocab.json. only 31'),
    ('blank', 'broken: the blank has the number 5 in config.json, but 0 in the tokenizer'),
    ('tokenizer', 'broken'), ('head', 'Wav2Vec2ForCTC without a ForSequenceClassification head'), ('encoder', 'without a ForCTC head')])
def test_a_teacher_that_does_not_fit_is_named_before_training(data, recogniser, tmp_path, fault, message):
    home,source,_ = data
    broken = shutil.copytree(recogniser, tmp_path/'broken')
    def change(name, fn): (broken/name).write_text(json.dumps(fn(json.loads((broken/name).read_text()))))
    if fault=='vocabulary': change('vocab.json', lambda v: {c: i for c,i in v.items() if i<31})
    if fault=='blank': change('config.json', lambda c: {**c, 'pad_token_id':5})
    if fault=='tokenizer':
        for name in ('vocab.json','tokenizer_config.json','tokenizer.json','processor_config.json','special_tokens_map.json'): (broken/name).unlink(missing_ok=True)
    teacher = dict(case=recogniser, encoder=source).get(fault, str(broken))
    own = Speech(dict(name='calls', kind='speaker' if fault=='head' else 'asr'), teacher)
    normalise = 'none' if fault=='case' else 'upper'
    with pytest.raises(ValueError, match=message):
        own.read(['calls'], teacher, tmp_path, str(home/'manifest.tsv'), scale='smoke', normalise=normalise)

# ---- tasks of the user's own

@pytest.mark.parametrize('kind', TASKS)
def test_an_own_manifest_is_a_task_of_its_own(data, tmp_path, kind):
    "With its name, its labels and, for transcripts, its alphabet; helper processes know it, too"
    home,source,_ = data
    df = pd.read_csv(home/'manifest.tsv', sep='\t', dtype=str)
    df['text'] = df.text.str.upper()+'!'
    df.to_csv(home/'own.tsv', sep='\t', index=False)
    own = Speech(dict(name='calls', kind=kind))
    data_args = dict(tasks=['calls'], source=source, cache=str(tmp_path), data=str(home/'own.tsv'), scale='smoke')
    corpora = own.read(**data_args)
    if kind=='asr': assert corpora['calls'].part(own.tasks['calls'], 'train').labels.chars[:3]=='|!E'
    grid_args = dict(tasks=['calls'], modes=['standard','target'], seeds=[0], source=source, scale='smoke', steps=2, steps_student=2)
    train_as_helper('cald.paper.table3:Speech', data_args, grid_args, tmp_path/'runs', own=own.own)
    store = Store(tmp_path/'runs', own.modules)
    results = own.train(data_args, grid_args, corpora, store)
    assert all(len(r['sessions'])==1 for r in results.record), 'the helper has trained them'
    table = own.table(results)
    assert set(table.task)=={'calls'} and ('slot accuracy' in set(table.metric))==(kind=='intent')

def test_transcripts_are_normalised_as_asked(data, tmp_path):
    home,_,_ = data
    df = pd.read_csv(home/'manifest.tsv', sep='\t', dtype=str)
    df.assign(text=df.text.str.upper()+'!').to_csv(home/'loud.tsv', sep='\t', index=False)
    read = lambda how: read_data(str(home/'loud.tsv'), 'asr', tmp_path, normalise=how).text[0]
    assert (read('none'),read('lower'),read('letters'))==(df.text[0].upper()+'!', df.text[0]+'!', df.text[0])
    with pytest.raises(ValueError, match='letters'): read('leters')

def test_a_streamed_corpus_does_not_grow_with_its_hours(tmp_path):
    "Reading and checking keep no audio, and neither audio nor hashes are read a second time"
    source,noise = smoke_wav2vec2(tmp_path),np.random.default_rng(0)
    def peak(n):
        home = tmp_path/str(n)
        home.mkdir()
        rows = []
        for i in range(n):
            sf.write(home/f'{i}.wav', .1*noise.standard_normal(160000), 16000)
            rows.append(dict(audio=f'{i}.wav', text='one', split=('train','dev','test')[i%3]))
        pd.DataFrame(rows).to_csv(home/'m.tsv', sep='\t', index=False)
        tracemalloc.start()
        corpus = make_corpus(read_data(str(home/'m.tsv'), 'asr', home), TASKS['asr'], source, home, keep=False)
        part = corpus.part(TASKS['asr'], 'train')
        assert part.lengths==[10.]*len(part)
        for item in part: assert item['samples']==160000==len(item['input_values'])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found
    assert peak(60)<1.3*peak(6)

def test_the_audio_of_a_batch_is_bounded(data, tmp_path, monkeypatch):
    "In training, alignment and the choice of layers, where more would fit into a batch by number, and in prediction, which stays the same"
    home,source,corpora = data
    part = corpora['asr'].part(TASKS['asr'], 'train')
    limit = 2.5*max(seconds_of(part))
    (_,first),(_,c) = exp.grid(['asr'], ['standard','target, aligned, a quarter kept'], [0], source, 'smoke',
                                steps=4, batch=6, batch_seconds=limit, train_share=.8)
    sizes = []
    def collate(items, make=exp.collate):
        seconds = max(item['samples'] for item in items)/16000
        sizes.append((len(items), len(items)*seconds))
        return make(items)
    monkeypatch.setattr(exp, 'collate', collate)
    monkeypatch.setattr(exp, 'record', 0) # no hidden states, which have a batch of their own
    for c in (first,c): train(exp, Store(tmp_path), c, corpora['asr'])
    assert max(n for n,_ in sizes)<6 and 1.5*max(seconds_of(part))<max(s for _,s in sizes)<=limit
    model = exp.load(Store(tmp_path).run(c, corpora['asr'].hash).folder/'model')
    assert predict_speech(model, part, seconds=limit)==predict_speech(model, part)

def test_the_sampler_of_lengths_is_that_of_samples(data, tmp_path):
    "A data set that knows its lengths is grouped as one that transformers has to read"
    home,source,corpora = data
    (_,c),*_ = exp.grid(['asr'], ['standard'], [0], source, 'smoke', steps=2)
    part = corpora['asr'].part(TASKS['asr'], 'train')
    run = Store(tmp_path).run(c, 'x')
    trainer = exp.make_trainer(c, exp.recipe(**settings(c)), run, exp.source(c, exp.recipe(**settings(c)), part.labels), Unguided(), dict(train=part, dev=part), part.labels)
    torch.manual_seed(0)
    known = list(trainer._get_train_sampler())
    torch.manual_seed(0)
    assert known==list(Trainer._get_train_sampler(trainer))
