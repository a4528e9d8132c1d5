# Makefile for imgserver; any make will do: illumos', bmake, GNU make.
#
#     make            config, smf and info: ready to run where it is
#     make test       the tests, which need nothing but Python: a minute and a half
#     make check      all of them, random and long ones too, and shellcheck if it is installed
#     make bench      beside nginx: some fifteen minutes
#     make install    into PREFIX, with a configuration and a service of its own
#     make uninstall  remove the installed files, but neither configuration nor images
#     make clean      remove compiled and temporary files
#
# PYTHON=... chooses another Python; SMF_FLAGS='--user U --group G' who runs the service; without
# them, the user and group of the image-server.smf.xml that is there stay.

PREFIX = /opt/imgserver
DESTDIR =
SMF_FLAGS =

MANIFEST = image-server.smf.xml
PROGRAMS = imgserver.py import-image mkimg
TEXTS = README.md LICENSE
FIND_PYTHON = python=`PYTHON='$(PYTHON)' ./import-image -p` || exit 1

all: config smf info

.PHONY: all config smf info test check bench install uninstall clean FORCE

FORCE:

# The creator's and the vendor's UUID, once; everything else in config.json stays.
config:
	@$(FIND_PYTHON); "$$python" imgserver.py config

# The service for this directory, user and Python; written only if that changes it.  The server
# starts faster and smaller from compiled code, which Python ignores once imgserver.py changes.
COMPILE = -IS -c 'import sys; from importlib.machinery import SourceFileLoader; \
    SourceFileLoader("imgserver", sys.argv[1]).get_code("imgserver")'
smf:
	@$(FIND_PYTHON); \
	trap 'rm -f $(MANIFEST).new' 0; trap 'exit 1' 1 2 15; \
	"$$python" imgserver.py smf $(SMF_FLAGS) > $(MANIFEST).new || exit 1; \
	if cmp -s $(MANIFEST).new $(MANIFEST); then :; \
	else mv -f $(MANIFEST).new $(MANIFEST) && echo 'wrote $(MANIFEST)'; fi && \
	umask 022 && "$$python" $(COMPILE) imgserver.py

info:
	@$(FIND_PYTHON); \
	echo 'Run it as a service, or by hand:'; \
	echo '    svccfg import $(MANIFEST) && svcadm enable image-server'; \
	echo "    $$python imgserver.py"; \
	echo 'and on each machine that wants its images, with its address or that of a proxy before it:'; \
	echo '    imgadm sources -a http://HOST:PORT'

test:
	@$(FIND_PYTHON); "$$python" tests/run.py

check:
	@for file in import-image mkimg; do \
	    sh -n $$file || exit 1; \
	    if command -v shellcheck >/dev/null; then shellcheck $$file || exit 1; fi; \
	done; \
	$(FIND_PYTHON); IMGSERVER_CHECK=1 "$$python" tests/run.py

bench: FORCE
	@$(FIND_PYTHON); "$$python" bench/bench.py

# A config.json that is there already stays; so do the images.  Of these files only imgserver.py
# and import-image must be here.
install:
	@$(FIND_PYTHON); directory='$(DESTDIR)$(PREFIX)'; \
	trap 'rm -f "$$directory/.new"' 0; trap 'exit 1' 1 2 15; \
	mkdir -p "$$directory" || exit 1; \
	put() { if [ -f "$$1" ] || [ "$$1" = imgserver.py ]; then \
	            cp "$$1" "$$directory/.new" && chmod "$$2" "$$directory/.new" && \
	            mv -f "$$directory/.new" "$$directory/$$1" || exit 1; \
	        fi; }; \
	for file in $(PROGRAMS); do put $$file 755; done; \
	for file in $(TEXTS); do put $$file 644; done; \
	if [ ! -f "$$directory/config.json" ]; then put config.json 644; fi; \
	"$$python" "$$directory/imgserver.py" config && \
	"$$python" "$$directory/imgserver.py" smf --directory '$(PREFIX)' $(SMF_FLAGS) \
	    > "$$directory/.new" && chmod 644 "$$directory/.new" && \
	mv -f "$$directory/.new" "$$directory/$(MANIFEST)" && \
	umask 022 && "$$python" $(COMPILE) "$$directory/imgserver.py" && \
	echo "installed in $$directory; its service: svccfg import '$(PREFIX)/$(MANIFEST)'"

uninstall:
	@directory='$(DESTDIR)$(PREFIX)'; \
	for file in $(PROGRAMS) $(TEXTS) $(MANIFEST) __pycache__; do \
	    rm -rf "$$directory/$$file" || exit 1; \
	done; \
	echo "config.json and the images in $$directory are left; if its service is still there:"; \
	echo '    svcadm disable -s image-server; svccfg delete image-server'

clean:
	rm -rf __pycache__ tests/__pycache__ bench/__pycache__ $(MANIFEST).new .config.json.[0-9]*
