"Packaging. Every fact comes from settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
def words(k): return cfg.get(k, '').split()
lib = cfg['lib_path']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['homepage'], license='Apache-2.0',
    keywords=words('keywords'), python_requires='>='+cfg['min_python'],
    packages=find_packages(include=[lib, lib+'.*']), zip_safe=False,
    include_package_data=False, package_data={lib: ['checkpoints/**/*', 'paper/*.csv', 'paper/*.yaml', 'paper/*.md']},
    install_requires=words('requirements'),
    extras_require={k: words(k+'_requirements') for k in ('demo','minilm','smollm2','whisper','eval','cuda','dev')},
    entry_points=dict(nbdev=[f'{lib}={lib}._modidx:d'], console_scripts=words('console_scripts')),
)
