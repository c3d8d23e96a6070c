//! The story: what is typed, what is expected of it, and what came back.

use std::fmt::Display;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::FETCH_ROLE;
use super::internet::{NAMES, PAGES, PORT, page, serve};
use crate::failure::Failure;
use crate::sandbox::stage::{self, Stage, StageSpec};

/// Begins again inside the stage's namespaces, and tells the story there.
pub(super) fn execute() -> Result<(), Failure> {
    if !stage::inside() {
        tell("A stage: a host and, across a wire, an internet of its own. Nothing leaves this machine.")?;
        let status = stage::reexec_self(["demo"]).map_err(|e| Failure::Failed(e.to_string()))?;
        return if status.success() {
            Ok(())
        } else {
            Err(Failure::Code(1))
        };
    }
    let stage = Stage::build(&StageSpec::default()).map_err(|e| Failure::Failed(e.to_string()))?;
    serve(&stage.internet).map_err(|e| Failure::Failed(format!("cannot serve the stage's internet: {e}")))?;
    let home =
        Home::new().map_err(|e| Failure::Failed(format!("cannot make a directory for the demo: {e}")))?;
    let result = play(&home);
    drop(home);
    result?;
    tell("\nEvery step happened.")?;
    Ok(())
}

fn play(home: &Home) -> Result<(), Failure> {
    tell("\n1. A command fetches a page. Nothing allows it, so its first packet is held.")?;
    let fetching = home.run(&["--secure-mode"], &format!("{PAGES}:{PORT}"))?;
    let id = home.asked("address")?;
    home.show(&["pending", "list"])?;
    tell("\n2. Somebody says yes, and the same connection attempt completes.")?;
    home.show(&["approve", &id])?;
    fetching.expect_page()?;

    tell("\n3. Another command, and somebody says no: it is refused at once.")?;
    let fetching = home.run(&["--secure-mode"], &format!("{PAGES}:{PORT}"))?;
    let id = home.asked("address")?;
    let denied_at = Instant::now();
    home.show(&["deny", &id])?;
    fetching.expect_failure("refused")?;
    check(denied_at.elapsed() < AT_ONCE, "the refusal came at once")?;

    tell("\n4. A name: its lookup is held, and one yes serves the lookup and the connection.")?;
    let fetching = home.run(&["--secure-mode"], &format!("asked.example:{PORT}"))?;
    let id = home.asked("name")?;
    home.show(&["pending", "list"])?;
    home.show(&["approve", &id])?;
    fetching.expect_page()?;

    tell("\n5. A name that a rule allows is asked of nobody.")?;
    home.run(
        &["--allow", "domain allowed.example"],
        &format!("allowed.example:{PORT}"),
    )?
    .expect_page()?;

    tell("\n6. A name that a rule denies is not looked up.")?;
    home.run(
        &["--deny", "domain blocked.example"],
        &format!("blocked.example:{PORT}"),
    )?
    .expect_failure("")?;

    tell("\n7. The history has all of it.")?;
    home.show(&["events", "list", "--limit", "20"])?;
    let events = home.json(&["events", "list", "--limit", "200"])?;
    let has = |kind: &str, part: &str| {
        let events = events.as_array().map_or(&[][..], Vec::as_slice);
        events
            .iter()
            .any(|event| event["kind"] == kind && event.to_string().contains(part))
    };
    check(
        has("EVENT_KIND_PENDING_OPENED", "demo"),
        "the history has the question",
    )?;
    check(
        has("EVENT_KIND_GRANT_CREATED", "ACTION_ALLOW") || has("EVENT_KIND_GRANT_CREATED", "allow"),
        "the history has the yes",
    )?;
    check(
        has("EVENT_KIND_GRANT_CREATED", "ACTION_DENY") || has("EVENT_KIND_GRANT_CREATED", "deny"),
        "the history has the no",
    )?;
    check(
        has("EVENT_KIND_FLOW_CLOSED", "demo"),
        "the history has the transfer",
    )?;
    check(
        has("EVENT_KIND_DNS_DENIED", "blocked.example"),
        "the history has the name that was not looked up",
    )
}

/// A place of its own for sockets and state, gone with the demo.
struct Home {
    path: PathBuf,
}

impl Home {
    fn new() -> io::Result<Self> {
        let random = getrandom::u64().map_err(io::Error::other)?;
        let path = std::env::temp_dir().join(format!("vnet-demo-{random:016x}"));
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self { path })
    }

    /// A `vnetctl` that knows of this place only.
    fn vnetctl(&self) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command
            .env("XDG_RUNTIME_DIR", &self.path)
            .env("XDG_STATE_HOME", &self.path)
            .env_remove("VNET_SERVER")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    /// Types a command, and shows it with what came back.
    fn show(&self, words: &[&str]) -> Result<(), Failure> {
        tell(format_args!("$ vnetctl {}", words.join(" ")))?;
        let status = self.vnetctl().args(words).status().map_err(failed)?;
        check(status.success(), &format!("`vnetctl {}` worked", words.join(" ")))
    }

    fn json(&self, words: &[&str]) -> Result<Value, Failure> {
        let output = self
            .vnetctl()
            .args(words)
            .args(["-o", "json"])
            .stderr(Stdio::inherit())
            .output()
            .map_err(failed)?;
        serde_json::from_slice(&output.stdout).map_err(|e| {
            Failure::Failed(format!(
                "`vnetctl {} -o json` printed no JSON: {e}",
                words.join(" ")
            ))
        })
    }

    /// Starts a command that fetches a page.
    fn run(&self, options: &[&str], target: &str) -> Result<Fetching, Failure> {
        let shown = options.iter().map(|o| {
            if o.contains(' ') {
                format!("'{o}'")
            } else {
                (*o).to_owned()
            }
        });
        tell(format_args!(
            "$ vnetctl run --vm demo {} -- fetch {target}",
            shown.collect::<Vec<_>>().join(" ")
        ))?;
        let mut child = self
            .vnetctl()
            .args(["run", "--vm", "demo", "--dns", &NAMES.to_string()])
            .args(options)
            .args(["--", "/proc/self/exe", FETCH_ROLE, target])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let stdout = child.stdout.take().map(read_in_background);
        let stderr = child.stderr.take().map(read_in_background);
        Ok(Fetching {
            child: Some(child),
            stdout,
            stderr,
        })
    }

    /// Waits until something is asked, and gives its id.
    fn asked(&self, kind: &str) -> Result<String, Failure> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let pending = self.json(&["pending", "list"])?;
            if let Some(request) = pending.get(0)
                && request["target"].get(kind).is_some()
                && let Some(id) = request["id"].as_str()
            {
                return Ok(id.to_owned());
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Err(Failure::Failed(format!(
            "nothing was asked within {} s",
            PATIENCE.as_secs()
        )))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // The controlplane was started for this place alone; nobody else can need it.
        if let Ok(stream) = UnixStream::connect(self.path.join("vnet/control.sock"))
            && let Ok(peer) =
                nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::PeerCredentials)
        {
            let controlplane = Pid::from_raw(peer.pid());
            let _ = kill(controlplane, Signal::SIGTERM);
            let deadline = Instant::now() + PATIENCE;
            while kill(controlplane, None).is_ok() && Instant::now() < deadline {
                std::thread::sleep(POLL_INTERVAL);
            }
        }
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// A command on its way; ended if the story ends before it.
struct Fetching {
    child: Option<Child>,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

impl Fetching {
    fn end(&mut self) -> Result<(ExitStatus, Vec<u8>, String), Failure> {
        let Some(mut child) = self.child.take() else {
            return Err(Failure::Failed("the command was waited for twice".to_owned()));
        };
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait().map_err(failed)? {
                break status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Failure::Failed(format!(
                    "the command did not end within {} s",
                    PATIENCE.as_secs()
                )));
            }
            std::thread::sleep(POLL_INTERVAL);
        };
        let text =
            |thread: Option<JoinHandle<Vec<u8>>>| thread.and_then(|t| t.join().ok()).unwrap_or_default();
        let (stdout, stderr) = (text(self.stdout.take()), text(self.stderr.take()));
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        for line in stderr.lines() {
            tell(format_args!("  {line}"))?;
        }
        Ok((status, stdout, stderr))
    }

    fn expect_page(mut self) -> Result<(), Failure> {
        let (status, stdout, _) = self.end()?;
        check(status.success(), "the command got its page")?;
        tell(format_args!("  {} bytes came back", stdout.len()))?;
        check(stdout == page(), "the page is whole")
    }

    fn expect_failure(mut self, part: &str) -> Result<(), Failure> {
        let (status, stdout, stderr) = self.end()?;
        check(!status.success() && stdout.is_empty(), "the command got nothing")?;
        check(stderr.contains(part), &format!("it was told {part:?}"))
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn read_in_background(mut from: impl io::Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = from.by_ref().take(OUTPUT_BYTES_MAX).read_to_end(&mut text);
        text
    })
}

/// A line of the story. Whoever read it may have gone away, which ends it.
fn tell(line: impl Display) -> Result<(), Failure> {
    Ok(io::stdout().write_all(format!("{line}\n").as_bytes())?)
}

fn check(happened: bool, what: &str) -> Result<(), Failure> {
    if happened {
        Ok(())
    } else {
        Err(Failure::Failed(format!("this did not happen: {what}")))
    }
}

fn failed(error: io::Error) -> Failure {
    Failure::Failed(format!("cannot run this program again: {error}"))
}

/// Each step; all of them together take seconds.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// A refusal is not an expiry: those take the hold time, 30 s.
const AT_ONCE: Duration = Duration::from_secs(5);
const OUTPUT_BYTES_MAX: u64 = 8 << 20;
