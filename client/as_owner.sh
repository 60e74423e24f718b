#!/bin/sh
# Runs a command as the owner of /data, so that what it writes there belongs to whom it should.
# Started as another user than root, it runs the command as that user.
set -eu
if [ "$(id -u)" = 0 ]; then
    exec setpriv --reuid "$(stat -c %u /data)" --regid "$(stat -c %g /data)" --clear-groups -- "$@"
fi
exec "$@"
