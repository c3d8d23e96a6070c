//! ssh, scp, git and curl through `gvproxy`, each with a real sshd at its other end: into the guest by the port of
//! `-ssh-port` and by `-forward-sock`, and out of it.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use vnet_tests::servers::inside;
use vnet_tests::{Ended, Running, World, eventually, staged};

const BYTES: usize = 8_000_000;

/// Starts sshd on port 22 of the namespace where it runs. Where root is the only user there is, sshd can
/// only be an ordinary one's: it is somebody in a user namespace of its own, whom `/etc/passwd` knows there.
const SSHD: &str = "#!/bin/sh
set -e
echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start
mount --bind passwd /etc/passwd
exec unshare -U --map-user=1000 --map-group=1000 -- /usr/sbin/sshd -D -e -f sshd_config
";

/// Keys, and what sshd reads.
struct Keys {
    own: PathBuf,
    work: PathBuf,
}

impl Keys {
    fn make(world: &World) -> Keys {
        let work = world.work();
        let key = |name: &str| {
            let path = work.join(name);
            let mut made = world.program("ssh-keygen");
            made.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&path);
            assert_eq!(Running::start(made).wait().code, 0, "{name}");
            path
        };
        let (host, own) = (key("host"), key("own"));
        fs::copy(own.with_extension("pub"), work.join("authorized_keys")).unwrap();
        let at = work.display();
        let config = format!(
            "HostKey {}\nAuthorizedKeysFile {at}/authorized_keys\nPidFile none\nUsePAM no\nUseDNS no\nStrictModes no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nSubsystem sftp internal-sftp\n",
            host.display()
        );
        world.file("sshd_config", &config);
        fs::create_dir(work.join("home")).unwrap();
        world.file("passwd", &format!("someone:x:1000:1000::{at}/home:/bin/sh\n"));
        let sshd = world.file("sshd.sh", SSHD);
        world.open_to_all(&sshd);
        Keys { own, work }
    }

    /// What each client is told, in the configuration's words.
    fn config(&self) -> PathBuf {
        let path = self.work.join("ssh_config");
        let text = format!(
            "IdentityFile {}\nUserKnownHostsFile {}\nStrictHostKeyChecking accept-new\nBatchMode yes\nUser someone\n",
            self.own.display(),
            self.work.join("known_hosts").display()
        );
        fs::write(&path, text).unwrap();
        path
    }
}

fn random_file(path: &Path) -> String {
    let mut bytes = vec![0; BYTES];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom").unwrap(), &mut bytes).unwrap();
    fs::write(path, bytes).unwrap();
    let sum = Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8_lossy(&sum.stdout)[..64].to_owned()
}

fn ran(mut command: Command, words: &[&str]) -> Ended {
    command.args(words);
    let ended = Running::start(command).wait();
    assert_eq!(ended.code, 0, "{words:?}: {ended:?}");
    ended
}

#[test]
fn ssh_and_scp_reach_the_guest_by_the_ssh_port() {
    staged(ssh_and_scp_reach_the_guest_by_the_ssh_port, |world| {
        let keys = Keys::make(world);
        let config = keys.config().display().to_string();
        let (_gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "40222"]);
        let mut sshd = world.guest_script(&socket, "ping -c 1 -W 5 192.168.127.1 >/dev/null; exec ./sshd.sh");
        sshd.complains("Server listening on 0.0.0.0 port 22");

        let ssh = ["-F", &config, "-p", "40222", "127.0.0.1"];
        let said = ran(
            world.program("ssh"),
            &[&ssh[..], &["echo $SSH_CONNECTION"]].concat(),
        );
        assert!(said.stdout.contains(" 192.168.127.2 22"), "{said:?}");

        let file = world.work().join("file");
        let sum = random_file(&file);
        let scp = ["-q", "-F", &config, "-P", "40222"];
        let name = file.display().to_string();
        ran(
            world.program("scp"),
            &[&scp[..], &[&name, "127.0.0.1:there"]].concat(),
        );
        ran(
            world.program("scp"),
            &[&scp[..], &["127.0.0.1:there", "back"]].concat(),
        );
        let back = ran(world.program("sha256sum"), &["back"]);
        assert!(back.stdout.starts_with(&sum), "{back:?}");

        // The client's end of input is the guest's, and what comes after it still arrives.
        let piped = format!(
            "ssh {} 'cat | sha256sum; sleep 0.3; echo after' < file",
            ssh.join(" ")
        );
        let piped = ran(world.program("sh"), &["-c", &piped]);
        assert_eq!(piped.stdout, format!("{sum}  -\nafter\n"), "{piped:?}");

        // What ends in the guest ends the client, with its status.
        let mut failing = world.program("ssh");
        failing.args(ssh).arg("exit 7");
        assert_eq!(Running::start(failing).wait().code, 7);
    });
}

#[test]
fn ssh_scp_and_git_of_the_guest_reach_the_internet() {
    staged(ssh_scp_and_git_of_the_guest_reach_the_internet, |world| {
        let keys = Keys::make(world);
        let config = keys.config().display().to_string();
        let mut command = world.program("./sshd.sh");
        command.current_dir(world.work());
        let mut sshd = inside(world.internet(), move || Running::start(command));
        sshd.complains("Server listening on 0.0.0.0 port 22");
        let sum = random_file(&world.work().join("file"));
        // Somebody else's repository is git's business: the server's own is made by the server.
        let script = format!(
            "set -e
             ssh='ssh -F {config}'
             $ssh 203.0.113.10 'git init -q repo && cd repo && git config user.email a@example && git config user.name a && \
                echo text > file && git add file && git commit -qm first'
             $ssh 203.0.113.10 sha256sum < file
             scp -q -F {config} file 203.0.113.10:there
             scp -q -F {config} 203.0.113.10:there back
             sha256sum back
             GIT_SSH_COMMAND=\"$ssh\" git clone -q ssh://203.0.113.10/~/repo clone
             cat clone/file"
        );
        let (_gvproxy, socket) = world.gvproxy_for_qemu(&["-ssh-port", "40222"]);
        let ended = world.guest_script(&socket, &script).wait();
        assert_eq!(
            (ended.code, &*ended.stdout),
            (0, format!("{sum}  -\n{sum}  back\ntext\n").as_str()),
            "{ended:?}"
        );
        eventually("no flow is left", || world.list(&["flows", "list"]).is_empty());
    });
}

/// A socket in the guest, as of podman's API.
const API: &str = "\
import http.server, socketserver, sys
class Api(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f'the guest has {self.path}\\n'.encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64
Server(sys.argv[1], Api).serve_forever()
";

#[test]
fn a_socket_of_the_guest_is_one_of_the_host_for_curl() {
    staged(a_socket_of_the_guest_is_one_of_the_host_for_curl, |world| {
        let keys = Keys::make(world);
        world.file("api.py", API);
        let [vm, ours] = ["vm.sock", "ours.sock"].map(|name| world.runtime_dir().join(name));
        let theirs = world.work().join("theirs.sock");
        let shown = |path: &Path| path.display().to_string();
        let mut gvproxy = Running::start(world.gvproxy(&[
            "-ssh-port",
            "-1",
            "-listen-qemu",
            &format!("unix://{}", vm.display()),
            "-forward-sock",
            &shown(&ours),
            "-forward-dest",
            &shown(&theirs),
            "-forward-user",
            "someone",
            "-forward-identity",
            &shown(&keys.own),
        ]));
        gvproxy.complains("waiting for clients");
        eventually("its socket is there", || ours.exists());
        assert_eq!(fs::metadata(&ours).unwrap().permissions().mode() & 0o777, 0o600);
        let curl = |path: &str| {
            let mut curl = world.program("curl");
            curl.args(["-sS", "-m", "25", "--unix-socket"]).arg(&ours);
            curl.arg(format!("http://d{path}"));
            Running::start(curl)
        };
        let script = "ping -c 1 -W 5 192.168.127.1 >/dev/null; python3 api.py theirs.sock & exec ./sshd.sh";
        let mut sshd = world.guest_script(&vm, script);
        sshd.complains("Server listening on 0.0.0.0 port 22");
        eventually("the guest serves", || theirs.exists());

        let listed = curl("/containers/json").wait();
        assert_eq!(listed.stdout, "the guest has /containers/json\n", "{listed:?}");
        let many: Vec<Running> = (0..16).map(|number| curl(&format!("/{number}"))).collect();
        for (number, one) in many.into_iter().enumerate() {
            let ended = one.wait();
            assert_eq!(ended.stdout, format!("the guest has /{number}\n"), "{ended:?}");
        }

        gvproxy.signal(Signal::SIGTERM);
        assert_eq!(gvproxy.wait().code, 0);
        assert!(!ours.exists() && theirs.exists(), "only the host's is removed");
    });
}
