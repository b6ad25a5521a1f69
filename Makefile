# `make` alone tells what there is to make.

# The system's interpreter is one that every user can run, as the mail system has to.
PYTHON = $(firstword $(wildcard /usr/bin/python3) python3)
PREFIX = /usr/local/qmail-smtpd-py
DESTDIR =

# Not empty: pyOpenSSL and python-daemon are those of PYTHON's host, and are not fetched
SYSTEM =

# "no": the listener is not compiled, as where there is no C compiler, or not the headers of PYTHON
COMPILE =

# make run
PORT = 2525

# make test: files or options for pytest, instead of all tests
TESTS =

# make cert, make cert-req; setup/cert tells what they are
QMAIL = /var/qmail
HOST =
DAYS = 825
KEY = rsa:2048
FROM =
OWNER =
GROUP =
FORCE =

help:
	@echo 'make run         take mail on 127.0.0.1 port $(PORT), without qmail and without root'
	@echo 'make test        run all tests; as root on Debian, with all that they need'
	@echo 'make install     install in PREFIX=$(PREFIX), with PYTHON=$(PYTHON);'
	@echo '                 SYSTEM=1 for pyOpenSSL and python-daemon of this host,'
	@echo '                 COMPILE=no for Python only'
	@echo 'make uninstall   remove what was installed in PREFIX, and nothing else'
	@echo 'make cert        make control/servercert.pem: HOST= DAYS= KEY=rsa:2048|ec|ed25519, or'
	@echo '                 put it together from the files in FROM=; OWNER= GROUP= QMAIL= FORCE=1'
	@echo 'make cert-req    make a key and a request for a certificate: HOST= KEY='
	@echo 'make lint        run ruff and mypy'
	@echo 'make bench       measure time and memory of sessions: PEER=path of another qmail-smtpd'
	@echo 'make bench-servers'
	@echo '                 the same of whole servers, with the programs in PREFIX: PEER= is needed'
	@echo 'make clean       remove what the others left in this directory'

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || \
		{ echo '$(PYTHON) is missing, or older than Python 3.9: name another by PYTHON=' >&2; exit 1; }

venv-module: python
	@PYTHON=$(PYTHON) setup/packages module:ensurepip=python3-venv

system-packages: python
	@$(if $(SYSTEM),PYTHON=$(PYTHON) setup/packages module:OpenSSL=python3-openssl \
		module:daemon=python3-daemon module:setuptools=python3-setuptools)

# The virtual environment of this checkout: with what the program needs, or with what tests need, too.
.venv/run: EXTRAS =
.venv/test: EXTRAS = [test,lint]
.venv/run .venv/test: setup.cfg pyproject.toml | venv-module system-packages
	$(PYTHON) -m venv $(if $(SYSTEM),--system-site-packages) .venv
	.venv/bin/python -m pip install --quiet 'pip >= 21.3'
	.venv/bin/python -m pip install --quiet --editable '.$(EXTRAS)'
	@touch .venv/run $@

run: .venv/run
	@setup/packages openssl=openssl
	@PORT=$(PORT) setup/demo

test: .venv/test
	@PYTHON=$(PYTHON) setup/test $(TESTS)

lint: .venv/test
	.venv/bin/ruff check
	.venv/bin/mypy

bench: .venv/run
	@.venv/bin/python -X no_debug_ranges -m qmail_smtpd_py.launcher .venv/bin
	.venv/bin/python bench/bench.py --program .venv/bin/qmail-smtpd $(if $(PEER),--peer $(PEER))
	.venv/bin/python bench/memory_limit.py --program .venv/bin/qmail-smtpd

bench-servers: .venv/run
	@test -n '$(PEER)' || { echo 'PEER= is the path of the qmail-smtpd to compare with' >&2; exit 1; }
	.venv/bin/python bench/servers.py --bin $(PREFIX)/bin --peer $(PEER)

install: venv-module system-packages
	@DESTDIR='$(DESTDIR)' SYSTEM='$(SYSTEM)' COMPILE='$(COMPILE)' \
		$(PYTHON) setup/install.py install '$(PREFIX)'

uninstall: python
	@DESTDIR='$(DESTDIR)' $(PYTHON) setup/install.py uninstall '$(PREFIX)'

cert cert-req: export QMAIL := $(QMAIL)
cert cert-req: export HOST := $(HOST)
cert cert-req: export DAYS := $(DAYS)
cert cert-req: export KEY := $(KEY)
cert cert-req: export FROM := $(FROM)
cert cert-req: export OWNER := $(OWNER)
cert cert-req: export GROUP := $(GROUP)
cert cert-req: export FORCE := $(FORCE)

cert:
	@setup/cert

cert-req:
	@setup/cert request

clean:
	rm -rf .venv .run *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: bench bench-servers cert cert-req clean help install lint python run system-packages test \
	uninstall venv-module
