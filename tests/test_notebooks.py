"The speech notebook as a user runs it: by `cald reproduce` and by papermill, at smoke scale, into folders of their own."
import json, os, re, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, papermill as pm, pytest, soundfile as sf
from cald.paper import status
from cald.paper.status import ARTEFACTS,module_hash
from cald.cli.main import main

root = Path(__file__).parents[1]
pytest.importorskip('espeakng_loader', reason='generated speech needs the extra `demo`')

@pytest.fixture
def store(tmp_path, monkeypatch):
    "Runs and cache in a folder of this test's own; the notebook's process finds the library of this tree"
    monkeypatch.setenv('CALD_RUNS', str(tmp_path/'runs'))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(root), *filter(None, [os.environ.get('PYTHONPATH')])]))
    return tmp_path

only = dict(tasks=['asr'], modes=['hybrid'])

def speech(store, **params):
    return pm.execute_notebook(root/'nbs'/'05_speech.ipynb', store/'05_speech.ipynb', progress_bar=False, kernel_name='python3',
                               parameters=dict(scale='smoke', seeds=[0], out=str(store/'runs'/'smoke'), **only, **params))

def results(store): return {p: p.stat().st_mtime_ns for p in (store/'runs').glob('*/result.json')}

def test_speech_writes_tables_figures_and_provenance_and_trains_once(store, monkeypatch, capsys):
    figures = sorted((root/'paper_figures').rglob('*'))
    monkeypatch.setattr(status, 'ARTEFACTS', [replace(next(a for a in ARTEFACTS if a.name=='table3'), params=only)])
    def cald(*args): assert main(args)==0; return capsys.readouterr().out
    assert 'Model cards written: 1' in cald('reproduce', 'table3', '--scale', 'smoke')
    out = store/'runs'/'smoke'
    df = pd.read_csv(out/'table3.csv')
    assert set(df['mode'])=={'standard','hybrid'} and set(df.metric)=={'WER','CER'} and (df.n==1).all() and df['mean'].notna().all()
    prov = json.loads((out/'table3.json').read_text())
    assert prov['scale']==['smoke'] and prov['seeds']==[0] and {'commit','environment','device','seconds','csv_sha256'} <= prov.keys()
    assert prov['made_from']['cald.paper.table3']==module_hash('paper.table3')
    assert re.search(r'table3 .*fresh +smoke', cald('status', '--out', str(out)))
    assert {p.name for p in out.iterdir()}=={f'table3{n}.{e}' for n,es in {'':('csv','md','json'), '_modes':('csv','png','pdf','json'), '_curves':('csv','png','pdf','json')}.items() for e in es}
    trained = results(store)
    assert len(trained)==2
    file = next((store/'runs').glob('*hybrid*/model/README.md'))
    card = file.read_text()
    assert 'mean nothing' in card and json.loads(next(f for f in trained if 'hybrid' in f.parent.name).read_text())['key'][:12] in card
    sf.write(store/'AUDIO.wav', np.random.default_rng(0).normal(0, .1, 16000), 16000)
    code = re.search('```python\n(.*?)```', card, re.S)[1].replace('FOLDER', str(file.parent))
    used = subprocess.run([sys.executable, '-c', code], cwd=store, capture_output=True, text=True)
    assert used.returncode==0 and "{'text': " in used.stdout, used.stderr
    assert 'Nothing to do' in cald('reproduce', 'table3', '--scale', 'smoke') and results(store)==trained
    speech(store, random=True)
    after = results(store)
    assert {p: t for p,t in after.items() if p in trained}==trained, 'a finished run was trained again'
    assert len(after)==3 and pd.read_csv(out/'table3.csv').equals(df)
    source = pd.read_csv(out/'source.csv')
    assert set(source.start)=={'pretrained','random weights'} and set(source.metric)=={'WER','CER'}
    standard = [json.loads(f.read_text()) for f in (store/'runs').glob('asr-*-standard-*/config.json')]
    assert sorted(c['settings']['random'] for c in standard)==[False,True]
    assert all(c['settings']['keep_frames']!=c['settings']['random'] for c in standard)
    assert sorted((root/'paper_figures').rglob('*'))==figures, 'smoke numbers reached paper_figures/'

def test_an_unknown_parameter_is_an_error_before_any_work(store):
    with pytest.raises(pm.PapermillExecutionError, match="did you mean 'steps'"): speech(store, stepz=3)
    assert not list((store/'runs').glob('*/config.json'))

def test_parameters_are_typed_and_described():
    out = subprocess.run([sys.executable, '-m', 'papermill', '--help-notebook', str(root/'nbs'/'05_speech.ipynb')], capture_output=True, text=True, check=True).stdout
    for name in 'scale tasks modes seeds source data data_asr data_intent data_speaker drop steps random workers runs out table force retrain'.split():
        line = next(l for l in out.splitlines() if l.strip().startswith(f'{name}:'))
        assert 'Unknown type' not in line, line
