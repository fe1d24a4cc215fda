#!/bin/bash
# Whether http://127.0.0.1:$1$2 answers 200. For health checks, in an image without curl.
set -eu
exec 3<> "/dev/tcp/127.0.0.1/$1"
printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$2" >&3
read -r _ status _ <&3
[ "$status" = 200 ]
