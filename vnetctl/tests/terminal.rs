//! A command in a guest, a person at a real terminal, and the relay between them: this program runs itself
//! on a pty that stands for the real terminal, and plays the person.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, tcgetattr};
use vnetctl::sandbox::{self, Spec};
use vnetctl::terminal::{self, GRACE, Key, Terminal};

const PATIENCE: Duration = Duration::from_secs(20);

/// The front's part.
fn front(script: &str) {
    let mut spec = Spec::new(["/bin/sh", "-c", script]);
    spec.program = Some(env!("CARGO_BIN_EXE_vnetctl").into());
    spec.pty = terminal::standard_streams();
    assert_eq!(spec.pty, [true; 3]);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let exit = runtime.block_on(async {
        let mut guest = sandbox::spawn(&spec).unwrap_or_else(|error| panic!("{error}"));
        let terminal = Terminal::attach(guest.pty.take().unwrap()).unwrap();
        assert!(terminal.can_prompt());
        guest.start().unwrap();
        let question = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            // One that is taken back, then one that is answered.
            let taken_back = tokio::time::timeout(Duration::from_millis(50), terminal.prompt("first? "));
            assert!(taken_back.await.is_err());
            let key = terminal.prompt("allow? ").await;
            assert_eq!(key, Some(Key::Char('y')));
            terminal.say("allowed");
            std::future::pending::<()>().await;
        };
        let exit = tokio::select! {
            exit = guest.wait() => exit,
            () = question => unreachable!(),
        };
        terminal.finish().await;
        exit
    });
    // In the way of every program's end: `exit` drops nothing.
    std::process::exit(exit.code.into());
}

/// What the person sees, up to and including `end`.
fn see(screen: &mut File, seen: &mut String, end: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !seen.contains(end) {
        assert!(Instant::now() < deadline, "waiting for {end:?}, saw {seen:?}");
        let ready = {
            let mut fds = [PollFd::new(screen.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(200u16)).unwrap()
        };
        if ready > 0 {
            let mut chunk = [0; 4096];
            let length = screen.read(&mut chunk).unwrap_or(0);
            seen.push_str(&String::from_utf8_lossy(&chunk[..length]));
        }
    }
}

#[test]
fn keys_answer_the_question_or_reach_the_command() {
    if let Ok(script) = std::env::var("VNET_TEST_SCRIPT") {
        return front(&script);
    }
    let pty = openpty(None, None).unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    let script = "stty size; read a; echo got-$a; sleep 1; echo held-output; read b; echo then-$b; \
                  test -t 0 && test -t 1 && exit 7";
    let stdio = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut front = Command::new("setsid")
        .args(["--ctty", "--wait"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "keys_answer_the_question_or_reach_the_command",
            "--exact",
            "--nocapture",
        ])
        .env("VNET_TEST_SCRIPT", script)
        .stdin(stdio())
        .stdout(stdio())
        .stderr(stdio())
        .spawn()
        .expect("setsid (package util-linux) gives the test a terminal");
    let mut screen = File::from(pty.master.try_clone().unwrap());
    let mut seen = String::new();

    see(&mut screen, &mut seen, "0 0\r\n");
    assert!(
        !tcgetattr(&pty.slave)
            .unwrap()
            .local_flags
            .contains(LocalFlags::ICANON),
        "the terminal is raw"
    );
    screen.write_all(b"one\r").unwrap();
    see(&mut screen, &mut seen, "got-one\r\n");
    see(&mut screen, &mut seen, "first? ");
    see(&mut screen, &mut seen, "allow? ");
    // Typed for the command: too early to be an answer.
    screen.write_all(b"y").unwrap();
    std::thread::sleep(GRACE + Duration::from_millis(1200));
    let mut fds = [PollFd::new(screen.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap();
    assert!(
        !seen.contains("held-output"),
        "the question is not hidden: {seen:?}"
    );
    screen.write_all(b"y").unwrap();
    see(&mut screen, &mut seen, "held-output\r\n");
    see(&mut screen, &mut seen, "allowed\r\n");
    assert!(
        seen.find("allow? y\r\n").unwrap() < seen.find("held-output").unwrap(),
        "{seen:?}"
    );
    screen.write_all(b"two\r").unwrap();
    // The early key was nobody's.
    see(&mut screen, &mut seen, "then-two\r\n");
    let status = front.wait().unwrap();
    assert_eq!(status.code(), Some(7), "{seen}");
    assert_eq!(
        tcgetattr(&pty.slave).unwrap().local_flags,
        before.local_flags,
        "the terminal is restored"
    );
}
