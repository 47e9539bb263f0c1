"Every line of README works in a fresh clone: Python blocks are run, commands too, at scale smoke where they train."
import os, re, shlex, subprocess, sys
from pathlib import Path
import pytest
from common import clone_files

root = Path(__file__).parents[1]
readme = (root/'README.md').read_text(encoding='utf-8')
pytest.importorskip('espeakng_loader', reason='the speech notebook needs the extra `demo`')

def blocks(language): return re.findall(rf'^```{language}\n(.*?)^```', readme, re.M|re.S)

OWN = {'convert','align','finetune','eval','info','bench'} # commands on the reader's models: one line needs the one before

def is_own(line): return line.split()[0]=='cald' and line.split()[1] in OWN

def all_lines(): return [l for block in blocks('sh') for l in block.splitlines() if l.strip()]

def lines(): return [l for l in all_lines() if not is_own(l)]

@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "The files of the repository as a clone has them, without anything that git ignores"
    return clone_files(tmp_path_factory.mktemp('clone'))

def run(command, clone):
    "Run `command`, a list of words, in the clone with the clone's library"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    env = {**os.environ, 'PYTHONPATH':str(clone), 'PATH':path, 'CALD_SCALE':'smoke', 'OMP_NUM_THREADS':'1'}
    for name in ('CALD_RUNS','CALD_OUT','IN_TEST'): env.pop(name, None)
    return subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True, timeout=900)

def small(line):
    "The words of a shell line: packages are not installed, make prints its commands, results are made at scale smoke"
    words = shlex.split(line)
    if words[0]=='make': return ['make','-n',*words[1:]]
    if words[:2]==['pip','install']:
        return [sys.executable,'-m','pip','install','--dry-run','--no-deps','--no-build-isolation','-q',*words[2:]]
    if words[:2]==['cald','reproduce'] and '--dry-run' not in words: return [*words,'--scale','smoke']
    return words

@pytest.mark.xdist_group('readme') # one clone, and runs that two lines share
@pytest.mark.parametrize('line', lines())
def test_shell_lines_work_in_a_fresh_clone(clone, line):
    done = run(small(line), clone)
    assert done.returncode==0, f'{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'

def test_the_session_in_the_shell_works(clone):
    words = dict(good='positive', fine='positive', bad='negative', dull='negative')
    for name,n in (('train',16), ('dev',4), ('test',4)):
        rows = [f'{name} {i}: a {word} film\t{label}\n' for i in range(n) for word,label in words.items()]
        (clone/f'{name}.tsv').write_text('text\tlabel\n'+''.join(rows))
    session = [l for l in all_lines() if is_own(l)]
    assert len(session)==6
    for line in session:
        few = ' --steps 4' if line.split()[1] in ('align','finetune') else ''
        done = run(shlex.split(line.replace('128:4096', '128:256')+few), clone)
        assert done.returncode==0, f'{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'

def test_python_blocks_run_one_after_the_other(clone):
    code = '\n'.join(blocks('python'))
    done = run([sys.executable,'-c',code], clone)
    assert done.returncode==0, done.stderr[-2000:]

def test_readme_comes_to_the_point():
    assert len(readme.split())<=1200
    assert len(readme[:readme.index('```python')].split())<=250
    assert readme[:readme.index('convert(')].count('\n')<40

def test_a_line_that_fails_is_noticed(clone):
    assert run(small('papermill nbs/05_speech.ipynb nowhere/05_speech.ipynb -p stepz 3'), clone).returncode
    assert run(small('cald reproduce tabel3 --dry-run'), clone).returncode
