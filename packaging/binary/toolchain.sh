#!/bin/bash
# Inside the build root, with nothing but Debian 11's compiler and the unpacked sources in /build: OpenSSL as static
# libraries, PyInstaller's start program, and a CPython in /opt/python. No network, no time of day in the results.
set -euo pipefail
cd /build
export LC_ALL=C TZ=UTC CC=gcc
JOBS=$(nproc)
trap 'echo "failed: $BASH_COMMAND"' ERR
set -E

# A patch set of Debian's source package, from the given line of its list on.
debian_patches() {
    sed -n "/^$1/,\$p" debian/patches/series | grep -v '^#' | while read -r name; do patch -sp1 -F0 <"debian/patches/$name"; done
}

openssl() {
    cd openssl-*/
    debian_patches ''
    # TLS as a client of HTTPS servers, and what certificates are signed with. Nothing is loaded at run time.
    ./Configure "linux-$(uname -m)" --prefix=/build/openssl --libdir=lib --openssldir=/etc/ssl \
        no-shared no-module no-dso no-engine no-legacy no-tests no-apps no-docs no-quic no-dtls no-ssl3 no-weak-ssl-ciphers \
        no-cmp no-cms no-ts no-ct no-srp no-psk no-gost no-sm2 no-sm3 no-sm4 no-camellia no-seed no-idea no-cast no-bf no-rc2 \
        no-rc4 no-rc5 no-rmd160 no-whirlpool no-mdc2 no-md4 no-aria no-siphash no-scrypt no-blake2 no-comp no-ktls no-http \
        no-rfc3779 no-ui-console no-slh-dsa no-ec2m no-afalgeng -O2 -g0 -ffunction-sections -fdata-sections
    make -s -j"$JOBS" build_libs
    make -s install_dev >/dev/null
}

# The flags of PyInstaller's own build script, which needs a Python; zlib is the one that comes with it.
bootloader() {
    cd pyinstaller-*/
    patch -sp1 -F0 </build/bootloader.patch
    cd bootloader
    gcc -O2 -Wall -Werror -Wno-unused-function -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 -D_REENTRANT -D_DEFAULT_SOURCE -DNDEBUG \
        -DHAVE_SEMAPHORE_H=1 -DPYI_USE_POSIX_SEMAPHORE -DHAVE_STDBOOL_H=1 -DHAVE_UNSETENV=1 -DHAVE_MKDTEMP=1 -DHAVE_DIRNAME=1 \
        -DHAVE_BASENAME=1 -DHAVE_WCSDUP=1 -Isrc -Izlib -s -o /build/run src/*.c zlib/*.c -ldl -lpthread
}

configure_python() {
    cd Python-*/
    # Debian's first patches make it Debian's; the later ones mend it.
    debian_patches shutdown-deadlock
    # Without these two, installing takes no time for byte code that nobody reads.
    rm -r Lib/test Lib/compileall.py
    cp -r /build/zlib-*/ Modules/zlib
    cp /build/modules.setup Modules/Setup.local
    ./configure -q --prefix=/opt/python --enable-shared --without-ensurepip --without-doc-strings --disable-test-modules \
        OPT='-O2 -DNDEBUG -g0 -fwrapv -Wall' CFLAGS='-fno-semantic-interposition -ffunction-sections -fdata-sections' \
        LDFLAGS='-Wl,--gc-sections -Wl,--exclude-libs,ALL -Wl,-rpath,/opt/python/lib -s'
}

(openssl) &
OPENSSL=$!
(bootloader)
(configure_python)
wait "$OPENSSL"
echo "$SECONDS s until CPython"
cd Python-*/
make -s -j"$JOBS"
make -s install >/dev/null
# PyInstaller's part for macOS imports it, and it would need a parser of XML.
: >/opt/python/lib/python3.11/plistlib.py
