//! A real sshd on a port of loopback, under an ordinary user's id, with keys and a directory of its own.
//!
//! It is started and stopped by hand, as a guest starts and stops; stopping it ends what it serves.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, getuid};

use crate::packages;
use crate::process::{descendants_of, eventually};

/// An sshd, its host keys, and who may log in.
#[derive(Debug)]
pub struct Sshd {
    directory: PathBuf,
    address: SocketAddr,
    user: User,
    running: Option<Child>,
}

impl Sshd {
    /// One that is not started yet.
    ///
    /// # Panics
    /// Where OpenSSH is not installed, with the package.
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        packages::check();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("vnet-sshd-{}-{number}", std::process::id()));
        fs::create_dir(&directory).expect("a directory");
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).expect("its mode");
        // As root, sshd would want directories of the system's; it takes nobody for a locked account.
        let user = if getuid().is_root() {
            User::from_name("daemon").expect("users").expect("daemon")
        } else {
            User::from_uid(getuid()).expect("users").expect("this user")
        };
        let address = own_address(number);
        let sshd = Self {
            directory,
            address,
            user,
            running: None,
        };
        let mut config = format!(
            "ListenAddress {address}\nAuthorizedKeysFile {0}/authorized_keys\nPidFile none\nUsePAM no\nUseDNS no\n\
             StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nLogLevel VERBOSE\n\
             MaxAuthTries 20\n",
            sshd.directory.display()
        );
        for kind in ["ed25519", "ecdsa"] {
            let key = sshd.make_key(&format!("host_{kind}"), &["-t", kind, "-N", ""]);
            sshd.give(&key);
            writeln!(config, "HostKey {}", key.display()).expect("text");
        }
        fs::write(sshd.path("config"), config).expect("a configuration");
        fs::write(sshd.path("authorized_keys"), "").expect("a file");
        sshd.give(&sshd.directory);
        sshd
    }

    /// One that runs.
    pub fn started() -> Self {
        let mut sshd = Self::new();
        sshd.start();
        sshd
    }

    /// Starts it with an empty log, and waits until it listens.
    ///
    /// # Panics
    /// Where it does not.
    pub fn start(&mut self) {
        let _ = fs::remove_file(self.path("log"));
        let mut command = if getuid().is_root() {
            let mut command = Command::new("setpriv");
            command.args([
                &format!("--reuid={}", self.user.uid),
                &format!("--regid={}", self.user.gid),
                "--clear-groups",
                "--",
                "/usr/sbin/sshd",
            ]);
            command
        } else {
            Command::new("/usr/sbin/sshd")
        };
        command.arg("-D").arg("-f").arg(self.path("config"));
        command.arg("-E").arg(self.path("log")).stdin(Stdio::null());
        self.running = Some(command.spawn().expect("sshd"));
        eventually("sshd listens", || self.log().contains("Server listening on"));
    }

    /// Ends it, and its sessions.
    pub fn stop(&mut self) {
        let Some(mut running) = self.running.take() else {
            return;
        };
        for (process, _) in descendants_of(running.id().cast_signed()) {
            let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
        }
        let _ = running.kill();
        let _ = running.wait();
    }

    /// How many processes serve its sessions: two each, once the user is let in.
    pub fn sessions(&self) -> usize {
        self.running
            .as_ref()
            .map_or(0, |sshd| descendants_of(sshd.id().cast_signed()).len())
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Who can log in.
    pub fn user(&self) -> &str {
        &self.user.name
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// What it has written.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// A key that ssh-keygen makes, with its public half beside it. It lets nobody in.
    ///
    /// # Panics
    /// Where ssh-keygen does not make it.
    pub fn make_key(&self, name: &str, arguments: &[&str]) -> PathBuf {
        let path = self.path(name);
        let made = Command::new("ssh-keygen")
            .args(["-q", "-f"])
            .arg(&path)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("ssh-keygen");
        assert!(made.status.success(), "{arguments:?}: {made:?}");
        path
    }

    /// A key that lets the user in.
    pub fn key(&self, name: &str, arguments: &[&str]) -> PathBuf {
        let path = self.make_key(name, arguments);
        self.admit(&path);
        path
    }

    /// Lets in who has a key.
    ///
    /// # Panics
    /// Where there is no public half.
    pub fn admit(&self, key: &Path) {
        let public = fs::read_to_string(format!("{}.pub", key.display())).expect("a public key");
        let file = self.path("authorized_keys");
        let before = fs::read_to_string(&file).expect("a file");
        fs::write(file, before + &public).expect("one more key");
    }

    /// Makes a file one of the user's.
    fn give(&self, path: &Path) {
        if getuid().is_root() {
            chown(path, Some(self.user.uid.as_raw()), Some(self.user.gid.as_raw())).expect("chown");
        }
    }
}

/// An address that is nobody else's, whoever looks for a free port and whenever this sshd is started again: of loopback,
/// all of which is Linux's own, by this process's id, with a port that no connection is given.
fn own_address(number: u32) -> SocketAddr {
    // An id has 22 bits at most.
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let port = 2_200 + u16::try_from(number).expect("a few in a process");
    // Not 127.0, where everybody else is.
    (Ipv4Addr::new(127, 64 + high % 64, middle, low), port).into()
}

impl Default for Sshd {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("sshd wrote: {}", self.log());
        }
        self.stop();
        let _ = fs::remove_dir_all(&self.directory);
    }
}
