"""The wheel in an environment of its own: README's shell session on recorded data, and what users do with its model

CALD_WHEEL=share runs it with the other packages of this environment, CALD_WHEEL=install lets pip install everything (minutes, gigabytes)."""
import csv, json, os, re, subprocess, sys, venv
from pathlib import Path
import pandas as pd, pytest
from common import clone_files,data_folder

root = Path(__file__).parents[1]
how = os.environ.get('CALD_WHEEL')
if how not in ('share','install'): pytest.skip('CALD_WHEEL is not set', allow_module_level=True)
pytestmark = pytest.mark.xdist_group('wheel')

def call(*command, cwd=None, **env):
    "Run `command` without any trace of the checkout; its output"
    names = ('PYTHONPATH','CALD_RUNS','CALD_OUT','CALD_SCALE','IN_TEST')
    clean = {k: v for k,v in os.environ.items() if k not in names}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env={**clean, 'OMP_NUM_THREADS':'1', **env}, capture_output=True, text=True)
    assert not done.returncode, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}'
    return done.stdout

@pytest.fixture(scope='module')
def bin(tmp_path_factory):
    "The scripts of an environment with the wheel"
    home = tmp_path_factory.mktemp('wheel')
    clone_files(home/'clone')
    call(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', home, home/'clone')
    wheel, = home.glob('cald-*.whl')
    venv.create(home/'env', with_pip=True)
    python = home/'env'/'bin'/'python'
    if how=='share':
        here,there = [Path(call(p, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))").strip()) for p in (sys.executable,python)]
        (home/'others').mkdir()
        for package in here.iterdir():
            if not re.match('cald|__editable__|pip|setuptools|_distutils|distutils-precedence', package.name): (home/'others'/package.name).symlink_to(package)
        (there/'others.pth').write_text(f"{home/'others'}\n")
        call(python, '-m', 'pip', 'install', '-q', '--no-deps', wheel)
    else: call(python, '-m', 'pip', 'install', '-q', wheel, 'peft>=0.17')
    where = call(python, '-c', 'import cald; print(cald.__file__)', cwd=home)
    assert str(home/'env') in where
    return python.parent

def texts(folder):
    "SST-2: two columns with a header, as published"
    data = data_folder('sst2')
    for split,file,n in (('train','glue_train',400), ('dev','glue_dev',100), ('test','glue_test',400)):
        pd.read_csv(data/f'{file}.tsv', sep='\t', quoting=csv.QUOTE_NONE).head(n).to_csv(folder/f'{split}.tsv', sep='\t', index=False, quoting=csv.QUOTE_NONE)
    return 'roberta-demo','linformer --set k=16'

def digits(folder):
    "The recorded digits: a manifest with `audio` and `label`"
    files = sorted((data_folder('fsdd')/'recordings').glob('*.wav'))
    rows = {s: [f for f in files if int(f.stem.split('_')[2]) in numbers] for s,numbers in (('train',range(2,6)), ('dev',[1]), ('test',[0]))}
    for split,found in rows.items():
        pd.DataFrame([dict(audio=str(f), label=f.stem[0]) for f in found]).to_csv(folder/f'{split}.tsv', sep='\t', index=False)
    return 'wav2vec2-demo','mamba2'

@pytest.fixture(scope='module', params=['sst2','fsdd'])
def session(request, bin, tmp_path_factory):
    "The folder in which README's six lines were run, with few steps"
    folder = tmp_path_factory.mktemp(request.param)
    source,mixer = (texts if request.param=='sst2' else digits)(folder)
    readme = (root/'README.md').read_text(encoding='utf-8')
    own = r'^cald (?:finetune|convert|align|eval|bench) .*$'
    lines = re.findall(own, readme, re.M)
    assert len(lines)==6
    scores = {}
    for line in lines:
        line = line.replace('roberta-demo', source).replace('linformer --set k=16', mixer).replace('128:4096', '128:256')
        words = line.split()[1:]+(['--steps','20','--evals','2'] if 'finetune' in line else ['--steps','10'] if 'align' in line else [])
        scores[words[0]] = json.loads(call(bin/'cald', *words, '--json', cwd=folder).splitlines()[-1])
    assert 30<scores['eval']['accuracy']<=100 if request.param=='sst2' else 0<=scores['eval']['accuracy']<=100
    return request.param,folder

WITHOUT_CALD = '''
import sys, transformers
from transformers import AutoModelForSequenceClassification as Auto, AutoModelForAudioClassification as Audio
auto = Audio if sys.argv[1]=='fsdd' else Auto
class NoCald:
    def find_spec(self, name, *args):
        if name.split('.')[0]=='cald': raise ModuleNotFoundError(f'No module named {name!r}')
def said(**trust):
    try: auto.from_pretrained('final', **trust)
    except (ValueError,ImportError,OSError) as e: return str(e)
    raise AssertionError('loaded')
assert 'trust_remote_code=True' in said()
sys.meta_path.insert(0, NoCald())
assert 'pip install cald' in said(trust_remote_code=True)
del sys.meta_path[0]
assert type(auto.from_pretrained('final', trust_remote_code=True)).__name__.startswith('Cald')
'''

USED = '''
import sys, torch, transformers, cald
from pathlib import Path
from transformers import pipeline
what = sys.argv[1]
task = 'audio-classification' if what=='fsdd' else 'text-classification'
predict = pipeline(task, 'final')
model = predict.model.eval()
assert type(model).__name__.startswith('Cald')
if what=='fsdd':
    import soundfile
    from scipy.signal import resample_poly
    audio,rate = soundfile.read(open('test.tsv').readlines()[1].split('\\t')[0], dtype='float32')
    found = predict(dict(raw=resample_poly(audio, 16000, rate), sampling_rate=16000)) # others need torchaudio
    x = dict(input_values=torch.randn(2, 16000))
else:
    found = predict('A fine film.')
    x = dict(input_ids=torch.randint(10, 900, (2,24)))
assert found[0]['label'] in ('0123456789' if what=='fsdd' else '01'), found
with torch.no_grad():
    wanted = model(**x).logits
    torch.testing.assert_close(torch.compile(model)(**x).logits, wanted, rtol=1e-3, atol=1e-3)
model.save_pretrained('sharded', max_shard_size='2MB')
assert len(list(Path('sharded').glob('model-*.safetensors')))>1
again = type(model).from_pretrained('sharded').eval()
with torch.no_grad(): assert torch.equal(again(**x).logits, wanted)
half = type(model).from_pretrained('sharded', dtype=torch.bfloat16).eval()
with torch.no_grad(): low = half(**{k: v.to(torch.bfloat16) if v.is_floating_point() else v for k,v in x.items()}).logits
assert low.dtype==torch.bfloat16 and (low.float()-wanted).abs().max()<.3
from peft import get_peft_model, LoraConfig
names = [n for n,m in again.named_modules() if isinstance(m, torch.nn.Linear) and 'layer' in n][:8]
lora = get_peft_model(again, LoraConfig(r=2, target_modules=names))
out = lora(**x, labels=torch.tensor([0,1]))
out.loss.backward()
assert any(p.grad is not None and p.grad.abs().sum()>0 for n,p in lora.named_parameters() if 'lora_B' in n)
'''

GENERATED = '''
import torch, cald
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from cald.convert import convert
from cald.pretrained import shipped
source = AutoModelForCausalLM.from_pretrained(shipped('gpt_neox-demo'))
student = convert(source, to='mamba2', seed=0)
student.save_pretrained('lm')
AutoTokenizer.from_pretrained(shipped('gpt_neox-demo')).save_pretrained('lm')
write = pipeline('text-generation', 'lm')
assert type(write.model).__name__.startswith('Cald')
text = write('Once upon a time', max_new_tokens=8, do_sample=False)[0]['generated_text']
assert text.startswith('Once upon a time')
ids = torch.randint(5, 90, (2,9))
one,two = (write.model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=c, eos_token_id=None) for c in (True,False))
assert torch.equal(one, two) and one.shape==(2,15)
'''

def test_the_session_leaves_a_card_and_a_history(session):
    what,folder = session
    card = (folder/'final'/'README.md').read_text()
    assert 'pipeline' in card and ('linformer' if what=='sst2' else 'mamba2') in card
    assert [r['command'] for r in json.loads((folder/'final'/'cald_history.json').read_text())]==['finetune','convert','align','finetune']

def test_without_import_cald_the_error_says_what_to_do(session, bin, tmp_path):
    what,folder = session
    call(bin/'python', '-c', WITHOUT_CALD, what, cwd=folder, HF_MODULES_CACHE=str(tmp_path))

def test_what_users_do_with_the_model(session, bin):
    what,folder = session
    call(bin/'python', '-c', USED, what, cwd=folder)

def test_a_language_model_generates(bin, tmp_path): call(bin/'python', '-c', GENERATED, cwd=tmp_path)
