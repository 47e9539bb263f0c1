"""Do two trees train the same? Every cell of the tables and questions at scale smoke in both, weights and numbers to the last bit.

    python tests/same.py OLD NEW

OLD and NEW are checkouts, such as one of `git worktree add`. What is the same may go to `SAME` of nbs/09_status.ipynb."""
import argparse, hashlib, json, os, subprocess, sys, tempfile
from pathlib import Path

NOTEBOOKS = ('06_nlp','04a_nlp'),('07_lm','04b_lm'),('05_speech',),('08c_questions','06c_questions') # by their names now and before

def train(tree:Path, work:Path)->dict: # what a run is -> its numbers and the hash of its weights
    "Run `NOTEBOOKS` of `tree` at scale smoke, with everything that they write in `work`"
    work.mkdir()
    env = {**os.environ, 'PYTHONPATH':str(tree), 'CALD_CACHE':str(work/'cache'), 'HF_HUB_OFFLINE':'1', 'OMP_NUM_THREADS':'1'}
    for names in NOTEBOOKS:
        n = next(n for n in names if (tree/'nbs'/f'{n}.ipynb').exists())
        print(f'{tree}: {n}', flush=True)
        given = dict(scale='smoke', runs=work/'runs', out=work/'out', workers=1)
        subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', '--cwd', 'nbs', f'nbs/{n}.ipynb', str(work/f'{n}.ipynb'),
                        *(x for k,v in given.items() for x in ('-p',k,str(v)))], cwd=tree, env=env, check=True, stderr=subprocess.DEVNULL)
    found = {}
    for f in (work/'runs').glob('*/result.json'):
        config,lines = json.loads((f.parent/'config.json').read_text().replace(str(work), '')),f.parent/'metrics.jsonl' # checkpoints for smoke are made in `work`
        logged = [{k:v for k,v in json.loads(l).items() if k not in ('seconds','session')} for l in (lines.read_text().splitlines() if lines.exists() else [])]
        weights = [hashlib.sha256(w.read_bytes()).hexdigest() for w in sorted((f.parent/'model').glob('*.safetensors'))]
        found[json.dumps([config['cell'], config['settings']], sort_keys=True)] = json.loads(f.read_text())['result'],logged,weights
    return found

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('old', type=Path); p.add_argument('new', type=Path)
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as work: old,new = (train(t.resolve(), Path(work)/n) for t,n in ((o.old,'old'),(o.new,'new')))
    odd = [c for c in old.keys()|new.keys() if old.get(c)!=new.get(c)]
    print(f'{len(old.keys()|new.keys())} runs, {len(odd)} of them differ', *sorted(odd), sep='\n  ')
    return bool(odd) or not old

if __name__=='__main__': sys.exit(main())
