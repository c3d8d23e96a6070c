//! What a front does while its command runs: signals are the command's, suspension is everybody's.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

use super::front::{Event, Exit, Sandbox};
use crate::terminal::Terminal;

/// How long a suspended front waits to be stopped: nobody stops one that has no shell to return to.
const SUSPEND_TIMEOUT: Duration = Duration::from_millis(200);

/// Signals that are passed on to the command.
const PASSED_ON: [Signal; 6] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// Waits for the end of a started command: passes signals on to it, keeps its window's size, and
/// suspends this process (and its pipeline) when the command is suspended. From the first call on these
/// signals do not end this process any more; the end of the command does.
///
/// # Errors
/// The signals cannot be listened to.
pub async fn supervise(sandbox: &mut Sandbox, terminal: Option<&Terminal>) -> std::io::Result<Exit> {
    let mut passed_on = Vec::new();
    for number in PASSED_ON {
        passed_on.push((number, signal(SignalKind::from_raw(number as i32))?));
    }
    let mut resized = signal(SignalKind::window_change())?;
    let mut continued = signal(SignalKind::from_raw(Signal::SIGCONT as i32))?;
    loop {
        let next_signal = std::future::poll_fn(|context| {
            passed_on
                .iter_mut()
                .find_map(|(number, stream)| stream.poll_recv(context).is_ready().then_some(*number))
                .map_or(std::task::Poll::Pending, std::task::Poll::Ready)
        });
        tokio::select! {
            event = sandbox.event() => match event {
                Event::Exited(exit) => return Ok(exit),
                Event::Stopped(_) => {
                    if let Some(terminal) = terminal {
                        terminal.pause();
                    }
                    // As the terminal's own key would: the whole pipeline.
                    let _ = kill(Pid::from_raw(0), Signal::SIGTSTP);
                    let _ = tokio::time::timeout(SUSPEND_TIMEOUT, continued.recv()).await;
                    resume(sandbox, terminal);
                }
            },
            number = next_signal => drop(sandbox.signal(number as i32)),
            _ = continued.recv() => resume(sandbox, terminal),
            _ = resized.recv() => {
                if let Some(terminal) = terminal {
                    terminal.resize();
                }
            }
        }
    }
}

/// A guest that is gone is told by its next event.
fn resume(sandbox: &Sandbox, terminal: Option<&Terminal>) {
    if let Some(terminal) = terminal {
        terminal.resume();
    }
    let _ = sandbox.signal(Signal::SIGCONT as i32);
}
