"What tests of several modules share"
import json, os, shutil, subprocess
from pathlib import Path
import pytest, torch
from cald.lab import experiment
from cald.lab.store import Store

library = Path(__file__).parents[1]/'cald'

def module_name(file, folder=library):
    "'lab.grid' for cald/lab/grid.py"
    return '.'.join(file.relative_to(folder).with_suffix('').parts).removesuffix('.__init__')

# Python that begins a script: modules of cald can be imported, without the imports of cald itself (torch, transformers)
BARE = f"import sys,types; cald = sys.modules['cald'] = types.ModuleType('cald'); cald.__path__ = [{str(library)!r}]\n"

def source(cell): return ''.join(cell['source'])

def cells(notebook, kind=None):
    "The cells of file `notebook`, all or those of a kind ('code', 'markdown')"
    found = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return [c for c in found if kind in (None,c['cell_type'])]

def clone_files(folder):
    "`folder` with the files of the repository as a clone has them, without anything that git ignores; or skip"
    root = library.parent
    listed = subprocess.run(['git','ls-files','-co','--exclude-standard','-z'], cwd=root, capture_output=True, text=True)
    if listed.returncode: pytest.skip('this is not a git repository')
    for name in filter(None, listed.stdout.split('\0')):
        if not (root/name).is_file(): continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/name, folder/name)
    return folder

def data_folder(name):
    "`name` in the folder of recorded data, or skip"
    if not os.environ.get('CALD_DATA_DIR'): pytest.skip('CALD_DATA_DIR is not set: no recorded data')
    path = Path(os.environ['CALD_DATA_DIR'])/name
    if not path.is_dir(): pytest.skip(f'CALD_DATA_DIR has no {name}')
    return path

def train(exp, store, c, data):
    "The run of cell `c` of experiment `exp`, trained if it is not"
    run = store.run(c, data.hash)
    if not run.done:
        run.start()
        run.finish(exp.train_cell(c, run, data, store))
    return run

def check_interrupted(exp, first, c, data, folder, monkeypatch):
    "Cell `c`, whose teacher is `first`, leaves the same weights when it is cut off after two steps and goes on"
    models = []
    for name,stop in (('straight',None),('cut',2)):
        store = Store(folder/name)
        train(exp, store, first, data)
        run = store.run(c, data.hash)
        run.start()
        if stop:
            class Cut(experiment.LogTo):
                def on_step_begin(self, args, state, control, **kwargs):
                    if state.global_step==stop: raise SystemExit('cut')
            with monkeypatch.context() as m:
                m.setattr(experiment, 'LogTo', Cut)
                with pytest.raises(SystemExit): exp.train_cell(c, run, data, store)
            assert not (run.folder/'model').exists()
        exp.train_cell(c, run, data, store)
        models.append(exp.load(run.folder/'model').state_dict())
    assert list(models[0])==list(models[1])
    for n in models[0]: assert torch.equal(models[0][n], models[1][n]), n
