//! Stops the server when its owner dies without having done so.
//!
//! The watchdog is a `sh` that reads a pipe whose other end only the owner holds. A word on it means that all is well;
//! its end without one means that the owner is gone, by SIGKILL or by leaving `main` with the server in a static. That
//! needs no unsafe code, no polling, and no trust in the owner's last moments.
//!
//! The server's pid is taken for the server only while `postmaster.pid` still names it, so a recycled pid is never
//! signalled.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// `$1` data directory, `$2` pid, then folders to remove afterwards. 20 seconds are ample for a shutdown of what runs
/// here; after that the server is told to stop at once and recovers at its next start.
const SCRIPT: &str = r#"
IFS= read -r word
[ "$word" = done ] && exit 0
data=$1 server=$2; shift 2
running() { { IFS= read -r pid < "$data/postmaster.pid"; } 2>/dev/null && [ "$pid" = "$server" ]; }
running && kill -INT "$server"
seconds=0
while running && [ $seconds -lt 20 ]; do sleep 1; seconds=$((seconds + 1)); done
running && kill -QUIT "$server"
[ $# -eq 0 ] || rm -rf -- "$@"
"#;

/// A running watchdog. Dropping it without [`Watchdog::dismiss`] lets it act.
#[derive(Debug)]
pub(crate) struct Watchdog {
    shell: Child,
}

impl Watchdog {
    /// Watches over the server `pid` on `data`; removes `scratch` after it.
    pub(crate) fn spawn(pid: u32, data: &Path, scratch: &[&Path]) -> io::Result<Self> {
        let shell = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "weft-pg-watchdog"])
            .arg(data)
            .arg(pid.to_string())
            .args(scratch)
            .current_dir("/")
            .stdin(Stdio::piped())
            // Inherited, they would keep a pipe open that somebody reads to its end.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Out of reach of the terminal's Ctrl-C.
            .process_group(0)
            .spawn()?;
        Ok(Self { shell })
    }

    /// Ends the watchdog without its doing anything: the server has been stopped.
    pub(crate) fn dismiss(mut self) {
        if let Some(mut pipe) = self.shell.stdin.take() {
            // It can only fail if the watchdog is gone already.
            let _ = pipe.write_all(b"done\n");
        }
        let _ = self.shell.wait();
    }
}
