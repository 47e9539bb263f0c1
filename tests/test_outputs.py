"Stored outputs of notebooks are those that their code prints: every notebook that needs no training is executed again."
import json, math, os, re
from pathlib import Path
import nbformat, pytest
from nbclient import NotebookClient
from common import cells,source

root = Path(__file__).parents[1]

def needs_training(path):
    "Notebooks with parameters show results of hours of training, or of the pretraining of a source"
    return any('parameters' in c['metadata'].get('tags', []) for c in cells(path))

def is_slow(cell): return re.match(r'#\|\s*slow\b', source(cell))

def printed(cell):
    "The text that a cell has printed or returned; pictures and tables in HTML have a text form, too"
    if cell['cell_type']!='code': return ''
    texts = [o.get('text') or o.get('data', {}).get('text/plain', '') for o in cell['outputs']]
    text = '\n'.join(''.join(t).rstrip() for t in texts)
    return re.sub('^cald: building the [a-z ]*.*\n?', '', text, flags=re.M) # with an empty cache only

number = re.compile(r'(?<![\w.])-?(?:\d+\.\d+(?:e[-+]?\d+)?|\d+e[-+]?\d+)(?!\w)')

# Notebooks that show numbers of trained models: training amplifies the rounding of another processor
TRAINED = {'02_guidance', '03_distill'}

def same(a:str, b:str, rel_tol=.02, abs_tol=2e-4)->bool:
    "Are two outputs the same, decimals up to the rounding of another processor?"
    if number.sub('#', a).split()!=number.sub('#', b).split(): return False
    pairs = zip(map(float, number.findall(a)), map(float, number.findall(b)))
    return all(math.isclose(x, y, rel_tol=rel_tol, abs_tol=abs_tol) for x,y in pairs)

def stale(stored, new, **tolerance):
    "The cells whose stored output differs from the new one: (number, stored, new)"
    pairs = [(i, printed(a), printed(b)) for i,(a,b) in enumerate(zip(stored, new)) if not is_slow(a)]
    return [(i, a, b) for i,a,b in pairs if not same(a, b, **tolerance)]

notebooks = sorted((root/'nbs').glob('*.ipynb'))

@pytest.mark.parametrize('path', [n for n in notebooks if not needs_training(n)], ids=lambda p: p.stem)
def test_stored_outputs_are_true(path, monkeypatch, tmp_path):
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')])))
    monkeypatch.setenv('CALD_RUNS', str(tmp_path))
    for name in ('IN_TEST','CALD_SCALE','CALD_OUT'): monkeypatch.delenv(name, raising=False)
    if 'CALD_CACHE' not in os.environ: monkeypatch.setenv('CALD_CACHE', str(root/'runs'/'cache'))
    stored = nbformat.read(path, 4)
    new = nbformat.from_dict(json.loads(json.dumps(stored)))
    for cell in filter(is_slow, new.cells): cell['source'] = ''
    NotebookClient(new, timeout=900, kernel_name='python3', resources=dict(metadata=dict(path=str(path.parent)))).execute()
    tolerance = dict(rel_tol=.25, abs_tol=.02) if path.stem in TRAINED else {}
    wrong = stale(stored.cells, new.cells, **tolerance)
    assert not wrong, '\n'.join(f'cell {i}, stored:\n{a}\nnew:\n{b}' for i,a,b in wrong)

def test_a_stale_output_is_noticed():
    def cell(text): return dict(cell_type='code', source='x', outputs=[dict(output_type='stream', text=text)])
    assert not stale([cell('loss 0.512')], [cell('loss 0.513')])
    assert len(stale([cell('loss 0.512')], [cell('loss 0.612')]))==1
    assert len(stale([cell("['dev','test']")], [cell("['dev']")]))==1
    assert len(stale([cell('3 rows')], [cell('4 rows')]))==1
    assert len(stale([cell('fresh')], [cell('')]))==1
    building = 'cald: building the short convolution for this processor, once; it takes some seconds'
    assert not stale([cell('cpp')], [cell(f'{building}\ncpp')])
