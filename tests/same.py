"""Do two checkouts give the same numbers? Runs notebooks at scale smoke in both; compares weights, logs and tables.

    python tests/same.py OLD NEW [NOTEBOOK ...]

OLD and NEW are checkouts, such as one of `git worktree add`. Without names, the notebooks of all tables and questions
are run. `cald accept` runs this script before it stamps results again."""
import argparse, csv, hashlib, json, os, re, subprocess, sys, tempfile
from pathlib import Path

NOTEBOOKS = ['05_speech', '06_nlp', '07_lm', '08c_questions']
# Names of notebooks in commits before they were numbered in the order of imports
BEFORE = {'06_nlp':'04a_nlp', '07_lm':'04b_lm', '08_cka':'06_analysis', '08a_trajectories':'06a_trajectories',
          '08b_drawings':'06b_drawings', '08c_questions':'06c_questions', '08d_efficiency':'07_efficiency'}
# Measured anew by every run
TIMES = {'seconds', 'session', 'ms', 'us', 'memory_mb', 'peak_memory_mb'}

def without_times(row): return {k: v for k,v in row.items() if k not in TIMES}

def run_notebook(tree, name, work):
    "Run notebook `name` of checkout `tree` at scale smoke, with all its files below `work`"
    paths = [tree/'nbs'/f'{n}.ipynb' for n in (name, BEFORE.get(name, name))]
    path = next((p for p in paths if p.exists()), None)
    if not path: sys.exit(f'{tree} has no nbs/{name}.ipynb: give names without ending, such as 05_speech')
    print(f'{tree}: {path.name}', flush=True)
    env = {**os.environ, 'PYTHONPATH':str(tree), 'CALD_CACHE':str(work/'cache'), 'HF_HUB_OFFLINE':'1',
           'OMP_NUM_THREADS':'1'}
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    declared = '\n'.join(''.join(c['source']) for c in cells if 'parameters' in c['metadata'].get('tags', []))
    wanted = dict(scale='smoke', runs=work/'runs', out=work/'out'/name, workers=1)
    known = set(re.findall(r'^(\w+) *:', declared, re.M))
    given = [word for k,v in wanted.items() if k in known for word in ('-p', k, str(v))]
    papermill = [sys.executable, '-m', 'papermill', '--no-progress-bar', '--log-level', 'ERROR', '--cwd', 'nbs']
    subprocess.run([*papermill, str(path), str(work/f'{name}.ipynb'), *given], cwd=tree, env=env, check=True,
                   stderr=subprocess.DEVNULL)

def read_run(folder, work):
    "The cell of a run, its settings, and its numbers: result, log, and hashes of its weights"
    config = json.loads((folder/'config.json').read_text().replace(str(work), ''))
    session = json.loads((folder/'sessions.jsonl').read_text().splitlines()[-1])
    if 'source' in session: config['cell']['source'] = session['source'].replace(str(work), '') # not its hash
    log = folder/'metrics.jsonl'
    lines = log.read_text().splitlines() if log.exists() else []
    result = without_times(json.loads((folder/'result.json').read_text())['result'])
    files = sorted((folder/'model').glob('*.safetensors'))
    weights = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    logged = [without_times(json.loads(l)) for l in lines]
    return config['cell'],config['settings'],(result, logged, weights)

def read_table(path):
    "The rows of a CSV without measured times; of the summary of times only what they are measured of"
    rows = [without_times(r) for r in csv.DictReader(path.open())]
    if path.stem=='efficiency': rows = [{k: r[k] for k in ('family','mode','metric')} for r in rows]
    return rows

def numbers(tree:Path, work:Path, notebooks)->tuple: # of the runs, of the tables
    "Every run and table that `notebooks` of checkout `tree` make at scale smoke"
    work.mkdir()
    for name in notebooks: run_notebook(tree, name, work)
    runs = [read_run(f.parent, work) for f in (work/'runs').glob('*/result.json')]
    return runs,{f'{f.parent.name}/{f.name}': read_table(f) for f in (work/'out').rglob('*.csv')}

def by_name(old, new)->list: # of dicts from name to numbers
    """The runs of both checkouts by their cell and the settings that both know. One that a commit adds has its default
    in every run of these notebooks"""
    known = [set().union(*(settings for _,settings,_ in runs)) for runs,_ in (old,new)]
    found = []
    for runs,tables in (old,new):
        names = [json.dumps([c, {k: v for k,v in s.items() if k in known[0]&known[1]}], sort_keys=True) for c,s,_ in runs]
        if len(set(names))<len(names): sys.exit('two runs differ only in settings that one checkout does not know')
        found.append({**dict(zip(names, (n for *_,n in runs))), **tables})
    if known[0]^known[1]: print('settings of one checkout only:', *sorted(known[0]^known[1]))
    return found

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('old', type=Path)
    p.add_argument('new', type=Path)
    p.add_argument('notebooks', nargs='*', default=NOTEBOOKS)
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as work:
        old,new = (numbers(t.resolve(), Path(work)/n, o.notebooks) for t,n in ((o.old,'old'), (o.new,'new')))
    old,new = by_name(old, new)
    names = old.keys()|new.keys()
    differ = [n for n in names if old.get(n)!=new.get(n)]
    print(f'{len(names)} runs and tables, {len(differ)} of them differ', *sorted(differ), sep='\n  ')
    return bool(differ) or not old

if __name__=='__main__': sys.exit(main())
