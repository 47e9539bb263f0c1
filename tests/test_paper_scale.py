"The scale of the paper, by the commands of README, with tiny sources and corpora in the layouts of the published ones."
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, soundfile as sf
from cald.data.corpora import SLURP_FILES
from cald.files import read_json
from cald.paper.table3 import smoke_wav2vec2
from cald.tasks.lm import smoke_gpt_neox
from cald.tasks.text import smoke_roberta

root = Path(__file__).parents[1]
WORDS = ('stop','go on','wait')
rng = np.random.default_rng(0)

def hiss(path, seconds=1., **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, .1*rng.standard_normal(int(seconds*16000)), 16000, **kwargs)

def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(f'{r}\n' for r in rows))

def glue(home):
    for split,n in (('train',40),('dev',12)):
        def texts(name, i): return f'{name} of {split} {i}'
        lines(home/'SST-2'/f'{split}.tsv', ['sentence\tlabel', *(f'{texts("film", i)}\t{i%2}' for i in range(n))])
        lines(home/'QNLI'/f'{split}.tsv', ['index\tquestion\tsentence\tlabel', *(f'{i}\t{texts("which", i)}\t{texts("that", i)}\t{"not_"*(i%2)}entailment' for i in range(n))])
        pairs = [f'{i}\t{2*i}\t{2*i+1}\t{texts("how", i)}\t{texts("why", i)}\t{i%2}' for i in range(n)]
        lines(home/'QQP'/f'{split}.tsv', ['id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate', *pairs])

def imdb(home):
    for split in ('train','test'):
        for label in ('pos','neg'):
            for i in range(12): lines(home/split/label/f'{i}_7.txt', [f'the {label} review {i} of {split}'])

def tedlium(home):
    for split,talk in dict(train='A', dev='B', test='C').items():
        hiss(home/'legacy'/split/'sph'/f'{talk}.sph', 12, format='NIST', subtype='PCM_16')
        lines(home/'legacy'/split/'stm'/f'{talk}.stm', [f'{talk} 1 {talk} {i:.2f} {i+1.5:.2f} <o,f0,male> {WORDS[i%3]}' for i in range(0, 10)])

def slurp(home):
    for k,(name,(_,part)) in enumerate(SLURP_FILES.items()):
        rows = []
        for i in range(6):
            file = f'audio-{k}{i}.flac'
            hiss(home/'audio'/part/file)
            rows.append(json.dumps(dict(slurp_id=10*k+i, sentence=WORDS[i%3], scenario=('alarm','iot')[i%2], action=('set','play')[i%2], recordings=[dict(file=file, status='correct')])))
        lines(home/'dataset'/'slurp'/f'{name}.jsonl', rows)

def voxceleb(home):
    found = []
    for speaker in ('id10001','id10270'):
        for i in range(8):
            name = f'{speaker}/video{i}/00001.wav'
            hiss(home/'wav'/name, subtype='PCM_16')
            found.append(f'{1 if i<4 else 2 if i<6 else 3} {name}')
    lines(home/'iden_split.txt', found)

@pytest.fixture(scope='module')
def data_file(tmp_path_factory):
    "The data file of tiny corpora and sources; two steps each, and sizes that the sources have room for"
    home = tmp_path_factory.mktemp('paper')
    for make in (glue, imdb, tedlium, slurp, voxceleb): make(home/make.__name__)
    lines(home/'pile'/'train.jsonl', [json.dumps(dict(text=f'text number {i} '*40)) for i in range(60)])
    sources = dict(text=smoke_roberta(home), speech=smoke_wav2vec2(home), lm=smoke_gpt_neox(home))
    few = ['steps = 2','steps_student = 2','batch = 2','accumulate = 1','evals = 2','align = 2','bf16 = false']
    file = ['[sources]', *(f'{kind} = "{path}"' for kind,path in sources.items())]
    for t in ('qnli','qqp','sst2','imdb'): file += [f'[{t}]', f'data = "{"imdb" if t=="imdb" else "glue"}"', *few, 'length = 40', 'k = 4', 'waypoints = 2']
    for t,name in dict(asr='tedlium', intent='slurp', speaker='voxceleb').items(): file += [f'[{t}]', f'data = "{name}"', *few, 'headdim = 8', 'd_state = 8']
    file += ['[lm]', 'data = "pile"', 'steps_student = 2', *few[2:], 'length = 32', 'train_rows = 16', 'dev_rows = 4', 'test_rows = 4', 'd_inner = 64', 'dt_rank = 2']
    lines(home/'data.toml', file)
    return home/'data.toml'

def reproduce(data_file, folder, *args):
    env = {**os.environ, 'PYTHONPATH':str(root), 'CALD_RUNS':str(folder), 'OMP_NUM_THREADS':'1', 'HF_HUB_OFFLINE':'1'}
    for name in ('IN_TEST','CALD_SCALE','CALD_OUT'): env.pop(name, None)
    command = [sys.executable, '-m', 'cald', 'reproduce', *args, '--scale', 'paper', '--seeds', '1', '--workers', '1', '--data', str(data_file)]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=1800)

def test_a_dry_run_checks_everything(data_file, tmp_path):
    done = reproduce(data_file, tmp_path, 'all', '--dry-run')
    assert not done.returncode and 'missing' not in done.stdout.replace('missing in', ''), done.stdout+done.stderr
    assert done.stdout.count('found')>=12 and not list(tmp_path.glob('*/result.json'))
    data_file.with_name('less.toml').write_text('[asr]\ndata = "tedlium"\n')
    done = reproduce(data_file.with_name('less.toml'), tmp_path, 'table3')
    assert done.returncode and 'data of intent' in done.stderr and 'data of asr' not in done.stderr

NAMES = ['table1','table2','table3','fig3','cka','q2_switch'] if os.environ.get('CALD_SLOW') else ['table2']

def test_tables_and_figures_are_made(data_file, tmp_path):
    "All of them with CALD_SLOW=1, which takes minutes"
    done = reproduce(data_file, tmp_path, *NAMES)
    assert not done.returncode, done.stdout[-3000:]+done.stderr[-3000:]
    for name in NAMES:
        record = read_json(tmp_path/'paper'/f'{name}.json')
        assert record['scale']==['paper'] and record['seeds']==[0]
