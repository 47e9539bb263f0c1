"The commands on checkpoints and data of a user: every kind of task, interruptions, mistakes"
import inspect, json, os, re, shutil, subprocess, sys
from pathlib import Path
import numpy as np
import pandas as pd
import cald, pytest, soundfile, torch
from safetensors.torch import load_file
from transformers import (AutoModelForCausalLM,AutoTokenizer,BertConfig,BertModel,LlamaConfig,LlamaForCausalLM,pipeline,TrainerCallback,
                          Wav2Vec2Config,Wav2Vec2CTCTokenizer,Wav2Vec2FeatureExtractor,Wav2Vec2ForCTC,Wav2Vec2Processor)
from cald.cli import training
from cald.cli.folders import check_free,convert_folder,describe,read_history
from cald.cli.jobs import KINDS
from cald.cli.text_job import read_text_rows
from cald.cli.main import main,MODEL_COMMANDS,parse
from cald.cli.speech_job import find_job
from cald.cli.training import evaluate_folder,finetune_folder
from cald.data.tables import DataError
from cald.pretrained import find_source,shipped
from common import data_folder

quick = dict(steps=2, evals=1, progress='none')

@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def table(name, rows, columns=('text','label')):
    "A .tsv file of `rows`"
    lines = ['\t'.join(map(str, row)) for row in (columns, *rows)]
    Path(name).write_text('\n'.join(lines)+'\n')
    return name

def reviews(name='train.tsv', n=24):
    return table(name, [(f'{name} {i}: a {word} film', word) for i in range(n//2) for word in ('good','bad')])

def manifest(name='train.tsv', n=10, columns=('audio','text'), labels=('yes','no')):
    "Noises with `labels`"
    rng = np.random.default_rng(0)
    for i in range(n): soundfile.write(f'{name}{i}.wav', rng.normal(0, .1, 9600).astype('float32'), 16000)
    return table(name, [(f'{name}{i}.wav', labels[i%len(labels)]) for i in range(n)], columns)

def run(line, capsys):
    "Exit status, output and errors of a command line"
    capsys.readouterr()
    code = main(line.split())
    return code,*capsys.readouterr()

def test_recognition_from_a_manifest_to_a_pipeline(capsys):
    manifest()
    assert run('finetune wav2vec2-demo --data train.tsv --steps 2 --evals 1 --out teacher', capsys)[0]==0
    assert run('convert teacher --out student', capsys)[0]==0
    line = 'finetune student --data train.tsv --teacher teacher --align 2 --steps 2 --evals 1 --out final --json'
    code,out,err = run(line, capsys)
    assert code==0 and {'wer','cer','folder'}==set(json.loads(out))
    scores = json.loads(run('eval final --data train.tsv --predictions found.tsv --json', capsys)[1])
    found = pd.read_csv('found.tsv', sep='\t', keep_default_na=False)
    assert scores['samples']==10 and found.text.tolist()==['yes','no']*5 and found['where'][1]=='train.tsv, row 3'
    recognise = pipeline('automatic-speech-recognition', 'final')
    audio,_ = soundfile.read('train.tsv0.wav', dtype='float32')
    model = recognise.model
    assert type(model).__name__=='CaldWav2Vec2ForCTC' and model.config.vocab_size==7 # blank, space, e n o s y
    assert set(recognise(audio)['text'])<=set('enosy ')
    commands = [r['command'] for r in read_history('final')]
    assert commands==['finetune','convert','finetune'] and describe('final')['task']=='automatic-speech-recognition'

@pytest.mark.parametrize('column,labels,names', [('label',(0,1),['0','1']), ('speaker',('ann','ben'),['ann','ben']),
                                                 ('intent',('light_on','stop'),['light_on','stop'])])
def test_utterances_with_any_labels(column, labels, names):
    data = manifest(columns=('audio',column), labels=labels)
    finetune_folder('wav2vec2-demo', data, out='model', **quick)
    assert list(describe('model').values())[2]=='audio-classification'
    classify = pipeline('audio-classification', 'model')
    audio,_ = soundfile.read('train.tsv0.wav', dtype='float32')
    assert sorted(found['label'] for found in classify(audio))==names
    scores = evaluate_folder('model', data, predictions='found.tsv')
    found = pd.read_csv('found.tsv', sep='\t', dtype=str)
    assert scores['accuracy']==100*(found.prediction==found.label).mean()

def test_a_ctc_checkpoint_keeps_its_own_vocabulary():
    config = Wav2Vec2Config.from_pretrained(shipped('wav2vec2-demo'), vocab_size=7, pad_token_id=0)
    Wav2Vec2ForCTC(config).save_pretrained('theirs')
    Path('vocab.json').write_text(json.dumps({'<pad>':0, '<unk>':1, '|':2, 'E':3, 'S':4, 'Y':5, 'N':6}))
    tokenizer = Wav2Vec2CTCTokenizer('vocab.json', bos_token=None, eos_token=None)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained('theirs')
    data = manifest(labels=('yes','yes yes'))
    with pytest.raises(DataError, match='row 2 .*characters outside the vocabulary'): find_job('theirs', dict(test=data))
    job = find_job('theirs', dict(test=data), normalise='upper')
    assert job.labels.encode('YES')==[5,3,4] and job.labels.greedy([5,0,3,3,4])=='YES'

def test_a_language_model_of_another_family(capsys):
    tokenizer = AutoTokenizer.from_pretrained(shipped('gpt_neox-demo'))
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained('llama')
    tokenizer.save_pretrained('llama')
    Path('book.txt').write_text(' '.join(f'{i} comes before {i+1}.' for i in range(900)))
    for line in ('convert llama --to mamba2 --layers 1 --out student', 'align student --data book.txt --steps 2 --out aligned',
                 'finetune aligned --teacher llama --data book.txt --steps 2 --evals 1 --out final'):
        code,_,err = run(line, capsys)
        assert code==0, err
    scores = evaluate_folder('final', 'book.txt')
    assert scores['perplexity']>1 and scores['bits']>0
    model = AutoModelForCausalLM.from_pretrained('final')
    assert model.generate(torch.tensor([[5,6,7]]), max_new_tokens=4, do_sample=False).shape==(1,7)
    table('labelled.tsv', [(f'{w} {i}', w) for i in range(8) for w in ('one','two')]) # the same encoder as a classifier
    finetune_folder('final', 'labelled.tsv', out='classifier', **quick)
    assert describe('classifier')['model']=='CaldLlamaForSequenceClassification'

def test_pairs_and_numbers(capsys):
    pairs = table('pairs.tsv', [(f'is {i} even', f'it is {w}', i%2) for i in range(12) for w in ('red','blue')],
                  ('question','sentence','label'))
    finetune_folder('roberta-demo', pairs, out='pairs', **quick)
    separator = AutoTokenizer.from_pretrained('pairs').sep_token_id
    assert all(item['input_ids'].count(separator)==2 for item in find_job('pairs', dict(test=pairs)).sets['test'])
    numbers = table('numbers.tsv', [(f'film {i}', i/4) for i in range(20)])
    found = finetune_folder('roberta-demo', numbers, out='numbers', task='text-regression', **quick)
    assert set(found)=={'folder','pearson','mse'} and describe('numbers')['task']=='text-regression'
    evaluate_folder('numbers', numbers, predictions='found.tsv')
    assert pd.read_csv('found.tsv', sep='\t').prediction.dtype==float

@pytest.mark.parametrize('step', [0,3]) # before and after the first checkpoint
def test_an_interrupted_training_ends_as_an_uninterrupted_one(monkeypatch, capsys, step):
    data = reviews()
    shutil.copytree(shipped('roberta-demo'), 'source')
    config = json.loads(Path('source/config.json').read_text())
    Path('source/config.json').write_text(json.dumps({**config, 'hidden_dropout_prob':.1, 'attention_probs_dropout_prob':.1}))
    convert_folder('source', 'student', to='linformer', k=4)
    finetune_folder('source', data, out='teacher', **quick)
    options = dict(teacher='teacher', guidance='hybrid', align=3, steps=6, evals=3, progress='none')
    finetune_folder('student', data, out='straight', **options)
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step==step: raise KeyboardInterrupt
    made = training.make_distiller
    with monkeypatch.context() as m:
        def stopping(*args):
            trainer = made(*args)
            trainer.add_callback(Stop())
            return trainer
        m.setattr(training, 'make_distiller', stopping)
        with pytest.raises(KeyboardInterrupt): finetune_folder('student', data, out='cut', **options)
    assert not Path('cut').exists() and Path('cut.training').exists()
    for name,other,message in [('lr',2e-4,'lr 0.0001, now 0.0002'), ('length',16,'length 128, now 16'), ('drop',True,'drop False, now True')]:
        with pytest.raises(ValueError, match=message): finetune_folder('student', data, out='cut', **{**options, name:other})
    finetune_folder('student', data, out='cut', **options)
    assert (Path('cut')/'model.safetensors').read_bytes()==(Path('straight')/'model.safetensors').read_bytes()
    assert not Path('cut.training').exists()

def test_an_interrupted_training_is_resumed_under_another_name_of_its_checkpoint(monkeypatch, tmp_path):
    "A relative path, an absolute one and that of a copy are one checkpoint"
    shutil.copytree(shipped('roberta-demo'), 'ckpt')
    shutil.copytree('ckpt', 'copy')
    class Cut(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step==3: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(training, 'DevLines', Cut)
        with pytest.raises(KeyboardInterrupt): finetune_folder('ckpt', reviews(), out='model', steps=4, evals=4)
    seen = []
    class Seen(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs): seen.append(state.global_step)
    monkeypatch.setattr(training, 'DevLines', Seen)
    finetune_folder(str(tmp_path/'copy'), 'train.tsv', out='model', steps=4, evals=4)
    assert 0 not in seen and seen[-1]==3

LAUNCHERS = ['torch.distributed.run --nproc-per-node 2', 'accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2']

@pytest.mark.parametrize('launcher', LAUNCHERS, ids=['torchrun','accelerate'])
def test_two_processes_fine_tune_one_model(launcher, capsys, tmp_path):
    "The result is that of one process, and one of them reports and writes; other commands run in one process"
    shutil.copytree(find_source('roberta-demo'), 'source')
    config = json.loads(Path('source/config.json').read_text())
    Path('source/config.json').write_text(json.dumps(config|dict(hidden_dropout_prob=0., attention_probs_dropout_prob=0.)))
    reviews()
    def two(line):
        launch = [sys.executable, '-m', *launcher.split(), '-m', 'cald', *line.split()]
        tree = Path(cald.__file__).parents[1]
        return subprocess.run(launch, env={**os.environ, 'PYTHONPATH': str(tree), 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    train = 'finetune source --data train.tsv --dev train.tsv --steps 4 --evals 2 --batch 4 --json --out'
    done = two(f'{train} two')
    assert done.returncode==0, done.stderr
    assert json.loads(done.stdout)['folder']==str(tmp_path/'two') and not Path('two.training').exists()
    assert run(f'{train} one', capsys)[0]==0
    one,both = [load_file(f'{name}/model.safetensors') for name in ('one','two')]
    for name,p in one.items(): torch.testing.assert_close(both[name], p, rtol=0, atol=1e-5, msg=name)
    refused = two('info one')
    assert refused.returncode and 'cald info runs in one process' in refused.stderr

def test_mistakes_are_found_before_any_training(capsys):
    reviews()
    table('bad.tsv', [('fine','good'), ('','bad'), ('hm','good')])
    table('other.tsv', [('fine','splendid')])
    table('floats.tsv', [(f'film {i}', i/7) for i in range(20)])
    Path('misspelt.csv').write_text('sentence,sentiment\nfine,good\n')
    BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained('empty')
    convert_folder('roberta-demo', 'student', to='linformer', k=4)
    Path('file').write_text('')
    for line,message in [
        ('finetune roberta-demo --data nowhere.tsv', 'nowhere.tsv is not a file'),
        ('finetune roberta-demo --data bad.tsv', 'bad.tsv, row 3: `text` is empty'),
        ('finetune roberta-demo --data train.tsv --dev other.tsv', "other.tsv, row 2: unknown label 'splendid'"),
        ('finetune roberta-demo --data train.tsv --length 600', 'reads up to 512 tokens'),
        ('finetune roberta-demo --data train.tsv --snapshots 3 --steps 10', 'must divide'),
        ('finetune roberta-demo --data train.tsv --warmup 2', 'a share of the steps'),
        ('finetune roberta-demo --data floats.tsv', '--task text-regression'),
        ('finetune roberta-demo --data misspelt.csv', 'a `label` is needed for classification'),
        ('finetune empty --data train.tsv', 'has no tokenizer'),
        ('finetune roberta-demo --data train.tsv --out student', 'student exists'),
        ('finetune roberta-demo --data train.tsv --steps 0', 'at least 1'),
        ('finetune roberta-demo --data train.tsv --out file/x', 'cannot write to'),
        ('finetune ./nowhere --data train.tsv', 'there is no such folder'),
        ('finetune file --data train.tsv', 'file is a file'),
        ('finetune student --data train.tsv --align 2 --guidance waypoint --teacher student', 'no snapshots'),
        ('align roberta-demo --data train.tsv', 'not converted'),
        ('convert roberta-demo --to mambo --out x', 'mambo'),
        ('convert roberta-demo --layers 0-2 --out x', 'such as 0,2,4'),
        ('convert roberta-demo --to linformer --set k --out x', 'such as k=64'),
        ('convert roberta-demo --layers 9 --out x', 'from 0 to 3'),
        ('eval student --data train.tsv', 'fine-tune it first'),
        ('info nothing', 'neither a folder here nor a known name')]:
        code,_,err = run(line, capsys)
        assert code==2 and message in err, (line,err)
    left = {p.name for p in Path().iterdir()}
    assert left=={'train.tsv','bad.tsv','other.tsv','floats.tsv','misspelt.csv','empty','student','file'}, left

def test_words_that_are_almost_right_are_suggested(capsys):
    for line,near in [('convrt x','convert'), ('finetune x --gidance y','--guidance'), ('repro','reproduce')]:
        with pytest.raises(SystemExit) as stopped: parse(line.split())
        assert stopped.value.code==2 and f'did you mean {near!r}?' in capsys.readouterr().err

def test_help_and_mistakes_do_not_wait_for_torch():
    code = """import sys; sys.argv = ['cald', *{args}]
from cald.cli.main import main
try: main()
except SystemExit: pass
assert 'torch' not in sys.modules and 'transformers' not in sys.modules"""
    for args in (['--help'], ['finetune','--help'], ['convrt']):
        done = subprocess.run([sys.executable,'-c',code.replace('{args}', repr(args))], capture_output=True, text=True)
        assert done.returncode==0, done.stderr

def test_the_library_registers_its_models_everywhere_else():
    code = "import cald,sys; from transformers import CONFIG_MAPPING; assert 'cald-roberta' in CONFIG_MAPPING"
    assert subprocess.run([sys.executable,'-c',code]).returncode==0

def test_an_old_folder_stays_if_saving_fails(monkeypatch):
    convert_folder('roberta-demo', 'student', to='linformer', k=4)
    before = {p.name: p.read_bytes() for p in Path('student').iterdir()}
    def fail(*args): raise OSError('disk full')
    with monkeypatch.context() as m:
        m.setattr('cald.cli.folders.model_card', fail)
        with pytest.raises(OSError, match='disk full'): convert_folder('roberta-demo', 'student', to='linformer', k=8, force=True)
    assert {p.name: p.read_bytes() for p in Path('student').iterdir()}==before
    Path('.student.old').mkdir() # of a process that was killed
    convert_folder('roberta-demo', 'student', to='linformer', k=8, force=True)
    assert [p.name for p in Path().iterdir()]==['student'] and describe('student')['arguments']['k']==8

def test_nothing_but_the_folder_of_a_model_is_ever_replaced(monkeypatch):
    reviews()
    shutil.copytree(shipped('roberta-demo'), 'models/source')
    Path('mine').mkdir()
    for out in ('.', '..', 'models', 'models/source', 'mine', 'train.tsv'):
        with pytest.raises(FileExistsError): convert_folder('models/source', out, to='linformer', k=4, force=True)
    with pytest.raises(FileExistsError): finetune_folder('roberta-demo', 'train.tsv', out=str(Path.cwd()), force=True, **quick)
    judge = training.TableDistiller.evaluate
    def appears(*args, **kwargs): # while the model trains
        Path('late').mkdir(exist_ok=True)
        return judge(*args, **kwargs)
    monkeypatch.setattr(training.TableDistiller, 'evaluate', appears)
    with pytest.raises(FileExistsError): finetune_folder('roberta-demo', 'train.tsv', out='late', **quick)
    assert Path('late.training').exists() # nothing is lost

def test_aligned_mixers_are_saved_whatever_head_the_folder_has():
    convert_folder('gpt_neox-demo', 'lm', to='mamba', layers=[0])
    job = find_job('lm', dict(train=reviews()))
    model = job.load()
    name = model.new_weights()[0]
    with torch.no_grad(): model.get_parameter(name).add_(7)
    own = training.without_new_head(job, model)
    assert type(own).__name__=='CaldGPTNeoXForCausalLM' and torch.equal(own.get_parameter(own.new_weights()[0]), model.get_parameter(name))

def test_splits_of_a_file_are_kept_apart(capsys):
    rows = [(f'{s} film {i}', ('good','bad')[i%2], s) for s,n in (('train',24),('dev',6),('test',10)) for i in range(n)]
    table('all.tsv', rows, ('text','label','split'))
    reviews('dev.tsv', 8)
    finetune_folder('roberta-demo', 'all.tsv', out='model', **quick)
    assert evaluate_folder('model', 'all.tsv')['samples']==10
    assert '10 rows of other splits (test) are not used' in capsys.readouterr().out
    sets = find_job('roberta-demo', dict(train='all.tsv', dev='dev.tsv')).sets
    assert {s: len(ds) for s,ds in sets.items()}==dict(train=24, dev=8)

def test_a_model_is_evaluated_as_it_was_trained():
    finetune_folder('roberta-demo', reviews(), out='model', length=7, **quick)
    assert evaluate_folder('model', 'train.tsv')['length']==7
    assert evaluate_folder('model', 'train.tsv', length=9)['length']==9

def test_alignment_alone_does_not_turn_on_guidance():
    convert_folder('roberta-demo', 'student', to='linformer', k=4)
    finetune_folder('student', reviews(), align=2, out='model', **quick)
    assert read_history('model')[-1]['options']['guidance']=='unguided'

def test_a_classifier_gets_a_new_head_and_is_no_regressor():
    finetune_folder('roberta-demo', reviews(), out='model', **quick)
    table('other.tsv', [(f'film {i}', ('hot','cold','mild')[i%3]) for i in range(30)])
    with pytest.raises(DataError, match='--new-head'): finetune_folder('model', 'other.tsv', out='x', **quick)
    finetune_folder('model', 'other.tsv', out='other', new_head=True, **quick)
    assert describe('other')['task']=='text-classification' and set(pd.read_csv('other.tsv', sep='\t').label)==set(find_job('other', dict(test='other.tsv')).labels)
    with pytest.raises(ValueError, match='has no head for text-regression'): evaluate_folder('model', 'train.tsv', task='text-regression')

def test_intents_of_two_parts_are_one_label():
    def intents(name, labels): return manifest(name, len(labels), ('audio','intent'), labels)
    train = intents('train.tsv', ['light_on','music_off']*6)
    with pytest.raises(DataError, match="dev.tsv, row 2 .*unknown label 'light_off'"): find_job('wav2vec2-demo', dict(train=train, dev=intents('dev.tsv', ['light_off'])))
    mixed = intents('mixed.tsv', ['light_on','stop']*6)
    assert find_job('wav2vec2-demo', dict(train=mixed, dev=intents('dev.tsv', ['light_on']))).labels.classes==dict(label=['light_on','stop'])

def test_every_option_has_help(capsys):
    for command,function in MODEL_COMMANDS.items():
        with pytest.raises(SystemExit): parse([command,'--help'])
        text = capsys.readouterr().out
        assert 'examples:' in text
        for name in inspect.signature(function).parameters:
            if name=='progress': continue
            described = re.search(rf'^  (-n, )?(--)?{name.replace("_","-")}\b.*\n?(    .*)?[a-z]{{3}}', text, re.M)
            assert described, (command,name)

def test_recorded_data(capsys):
    "A checkpoint and real files, to an evaluated, saved linear model"
    train,test = (data_folder('sst2')/f'sentences_{s}.tsv' for s in ('train','dev'))
    few = pd.read_csv(train, sep='\t', quoting=3).head(300)
    few.to_csv('train.tsv', sep='\t', index=False, quoting=3)
    for line in ('finetune roberta-demo --data train.tsv --steps 10 --evals 1 --length 32 --out teacher',
                 'convert teacher --to linformer --set k=16 --out student',
                 'finetune student --teacher teacher --data train.tsv --steps 4 --evals 1 --length 32 --out final',
                 f'eval final --data {test} --length 32 --drop --json'):
        code,out,err = run(line, capsys)
        assert code==0, err
    assert json.loads(out)['samples']>800
