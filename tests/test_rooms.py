"The rooms of the library: who may import whom, and that notebooks are numbered in the order of imports."
import ast, re
from pathlib import Path
import pytest
from cald.paper.status import imported_names
from common import cells,library,module_name,source

root = Path(__file__).parents[1]
METHOD = {'method','kernels','linear','training'}
ALLOWED = dict(kernels={'kernels','method'}, linear={'kernels','linear','method'}, method=METHOD, training=METHOD, lab=METHOD|{'lab'}, data={'data'}, tasks=METHOD|{'lab','data','tasks'},
               paper=METHOD|{'lab','data','tasks','paper'}, cli=METHOD|{'lab','data','tasks','paper','cli'}, pretrain=METHOD|{'lab','data','tasks','pretrain'})

def modules(folder=library): return sorted(module_name(f, folder) for f in folder.rglob('*.py') if not f.name.startswith('_'))

def imports_of(module, folder=library):
    "The modules of cald that `module` ('lab.grid') imports when it is imported itself, not later in a function"
    file = folder/f"{module.replace('.', '/')}.py"
    top = [node for node in ast.parse(file.read_text(encoding='utf-8')).body if isinstance(node, ast.ImportFrom)]
    found = imported_names('\n'.join(map(ast.unparse, top)), f'cald.{module}'.rpartition('.')[0])
    names = {f.removeprefix('cald.') for f in found if f.startswith('cald.')}
    return {n for n in names if (folder/f"{n.replace('.', '/')}.py").exists()}

def room(module):
    "The room of `module`: a module at the top belongs to the method"
    return module.partition('.')[0] if '.' in module else 'method'

def number(notebook):
    "(8, 'b') for 08b_drawings; the order of numbers is the order of notebooks"
    digits,letter = re.match(r'(\d+)([a-z]*)_', notebook).groups()
    return int(digits),letter

def notebooks(folder=root/'nbs'):
    "module -> the notebook that exports it"
    found = {}
    for f in folder.glob('[0-9]*.ipynb'):
        code = '\n'.join(map(source, cells(f)))
        found[re.search(r'^#\|\s*default_exp\s+(\S+)', code, re.M)[1]] = f.stem
    return found

def wrong_way(folder=library):
    "Imports against the direction method <- lab, data <- tasks <- paper; `data` needs `cald.files` alone"
    def allowed(a, b): return room(b) in ALLOWED[room(a)] or (room(a)=='data' and b=='files')
    return [(a,b) for a in modules(folder) for b in sorted(imports_of(a, folder)) if not allowed(a, b)]

def too_early(folder=library, names=None):
    "Modules that import one whose notebook has a higher number"
    nb = names or notebooks()
    return [(nb[a],nb[b]) for a in modules(folder) for b in sorted(imports_of(a, folder)) if number(nb[a])<=number(nb[b])]

def test_imports_go_one_way(): assert not wrong_way()

def test_notebooks_are_numbered_in_the_order_of_imports():
    numbers = [number(n) for n in notebooks().values()]
    assert len(set(numbers))==len(numbers), 'two notebooks with one number'
    assert not too_early()

def test_few_modules_are_at_the_top(): assert len([m for m in modules() if room(m)=='method'])<=16

@pytest.mark.parametrize('module,line,seen', [
    ('convert', 'from .lab.grid import Cell', 'wrong_way'),
    ('data.tables', 'from ..convert import convert', 'wrong_way'),
    ('ops', 'from .mixers import Mamba', 'too_early'),
    ('paper.table3', 'from .cka import cka', 'too_early')])
def test_an_import_the_wrong_way_is_noticed(tmp_path, module, line, seen):
    for m in modules():
        path = f"{m.replace('.', '/')}.py"
        (tmp_path/path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/path).write_text((library/path).read_text(encoding='utf-8')+(f'\n{line}\n' if m==module else ''))
    check = dict(wrong_way=wrong_way, too_early=too_early)[seen]
    assert len(check(tmp_path))==1
