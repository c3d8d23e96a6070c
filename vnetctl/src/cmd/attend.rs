//! Watching one dataplane's VMs and their questions, for as long as `run` or `up` lasts.
//!
//! One task follows both watches and passes on what concerns this dataplane. When the controlplane
//! goes away it connects again (which starts the user's own anew); the dataplane announces what it
//! still holds, so the questions come back.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use vnet_proto::v1;

use super::questions::{Act, Answer};
use crate::client::{Client, Connection, Server, unary};
use crate::failure::{Failure, describe};

/// What was seen.
#[derive(Debug)]
pub enum Seen {
    /// The watches begin: what is listed from here on is what there is.
    Began,
    /// A VM of this dataplane, as it is now.
    Vm(Box<v1::Vm>),
    /// A VM of this dataplane that is gone, as it was.
    Gone(Box<v1::Vm>),
    /// Every VM that there is was told since the watches began.
    Synced,
    /// A change of a pending request of one of its VMs.
    Pending(Box<v1::WatchPendingResponse>),
    /// The controlplane does not answer; it is being tried again.
    Lost(String),
}

/// The task; it ends when this is dropped.
#[derive(Debug)]
pub struct Attendant {
    seen: mpsc::Receiver<Seen>,
    task: AbortHandle,
}

impl Attendant {
    /// Begins to watch for the dataplane of this name.
    pub fn start(connection: Connection, dataplane: String) -> Self {
        let (sender, seen) = mpsc::channel(SEEN_MAX);
        let task = tokio::spawn(async move {
            let mut lost = false;
            loop {
                let ended = match connection.open().await {
                    Ok(client) => follow(&client, &dataplane, &sender, &mut lost).await,
                    Err(failure) => End::Lost(failure.to_string()),
                };
                match ended {
                    End::Dropped => return,
                    // Said once, however long it takes.
                    End::Lost(why) if !lost => {
                        lost = true;
                        let _ = sender.send(Seen::Lost(why)).await;
                    }
                    End::Lost(_) | End::Gap => {}
                }
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        });
        Self {
            seen,
            task: task.abort_handle(),
        }
    }

    /// The next thing seen. Cancel safe.
    pub async fn next(&mut self) -> Seen {
        match self.seen.recv().await {
            Some(seen) => seen,
            // The task ends only with this.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Attendant {
    fn drop(&mut self) {
        self.task.abort();
    }
}

enum End {
    /// Nobody wants to know any more.
    Dropped,
    /// The streams ended.
    Lost(String),
    /// Changes were lost on the way; begin again to see all.
    Gap,
}

async fn follow(client: &Client, dataplane: &str, sender: &mpsc::Sender<Seen>, lost: &mut bool) -> End {
    let gone = |status: tonic::Status| End::Lost(describe(&status));
    let mut vms = match client.vms().watch_vms(v1::WatchVmsRequest::default()).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return gone(status),
    };
    let mut pending = match client
        .pending()
        .watch_pending(v1::WatchPendingRequest::default())
        .await
    {
        Ok(answer) => answer.into_inner(),
        Err(status) => return gone(status),
    };
    *lost = false;
    if sender.send(Seen::Began).await.is_err() {
        return End::Dropped;
    }
    // Whether each VM is this dataplane's.
    let mut ours: HashMap<String, bool> = HashMap::new();
    loop {
        let seen = tokio::select! {
            change = vms.message() => match change {
                Ok(Some(change)) if change.change() == v1::VmChange::Gap => return End::Gap,
                Ok(Some(v1::WatchVmsResponse { vm: Some(vm), change })) => {
                    let is_ours = vm.dataplane == dataplane;
                    if change == i32::from(v1::VmChange::Removed) {
                        ours.remove(&vm.name);
                        is_ours.then(|| Seen::Gone(Box::new(vm)))
                    } else {
                        ours.insert(vm.name.clone(), is_ours);
                        is_ours.then(|| Seen::Vm(Box::new(vm)))
                    }
                }
                Ok(Some(change)) if change.change() == v1::VmChange::Synced => Some(Seen::Synced),
                Ok(Some(_)) => None,
                Ok(None) => return End::Lost("the controlplane ended the watch".to_owned()),
                Err(status) => return gone(status),
            },
            change = pending.message() => match change {
                Ok(Some(change)) if change.change() == v1::PendingChange::Gap => return End::Gap,
                Ok(Some(change)) => {
                    let is_ours = match known(&ours, &change) {
                        Some(known) => known,
                        // The two streams are not ordered: the VM may be news still to come.
                        None => serves(client, dataplane, vm_of(&change)).await,
                    };
                    is_ours.then(|| Seen::Pending(Box::new(change)))
                }
                Ok(None) => return End::Lost("the controlplane ended the watch".to_owned()),
                Err(status) => return gone(status),
            },
        };
        if let Some(seen) = seen
            && sender.send(seen).await.is_err()
        {
            return End::Dropped;
        }
    }
}

fn vm_of(change: &v1::WatchPendingResponse) -> &str {
    change.request.as_ref().map_or("", |request| &request.vm)
}

/// Whether a change is of one of our VMs' questions, as far as that is known here.
fn known(ours: &HashMap<String, bool>, change: &v1::WatchPendingResponse) -> Option<bool> {
    match ours.get(vm_of(change)) {
        Some(is_ours) => Some(*is_ours),
        // Its VM may be gone already, and with it whose it was; who never heard of the question passes over its end.
        None if change.change() == v1::PendingChange::Removed => Some(true),
        // Of no VM.
        None if change.change() == v1::PendingChange::Synced => Some(true),
        None => None,
    }
}

async fn serves(client: &Client, dataplane: &str, vm: &str) -> bool {
    if vm.is_empty() {
        return false;
    }
    let request = v1::GetVmRequest { name: vm.to_owned() };
    let answer = client.vms().get_vm(unary(request)).await;
    answer.is_ok_and(|a| a.into_inner().vm.is_some_and(|vm| vm.dataplane == dataplane))
}

/// Sends an answer given at the prompt. The answer carries the etag of what was shown.
///
/// # Errors
/// What the controlplane refuses.
pub async fn send_answer(
    connection: &Connection,
    request: v1::PendingRequest,
    answer: Answer,
) -> Result<(), Failure> {
    let client = connection.open().await?;
    let v1::PendingRequest { id, etag, .. } = request;
    let once = v1::Lifetime {
        kind: Some(v1::lifetime::Kind::Once(true)),
    };
    match answer {
        Answer::Yes | Answer::Once => {
            let lifetime = (answer == Answer::Once).then_some(once);
            let request = v1::ApproveRequest {
                id,
                etag,
                lifetime,
                ..Default::default()
            };
            client.pending().approve(unary(request)).await?;
        }
        Answer::No => {
            let request = v1::DenyRequest {
                id,
                etag,
                ..Default::default()
            };
            client.pending().deny(unary(request)).await?;
        }
    }
    Ok(())
}

/// All about a request, what each answer would cover included.
///
/// # Errors
/// What the controlplane refuses.
pub async fn look(connection: &Connection, id: &str) -> Result<v1::PendingRequest, Failure> {
    let client = connection.open().await?;
    let request = v1::GetPendingRequest { id: id.to_owned() };
    let answer = client.pending().get_pending(unary(request)).await?.into_inner();
    answer
        .request
        .ok_or_else(|| Failure::Failed(format!("the controlplane said nothing of request {id}")))
}

/// Returns once the dataplane that serves this network has a session with the controlplane. What stands in the way is
/// told once, `late` in a while; from then on it is asked less often.
pub async fn has_session(connection: &Connection, network: &str, late: impl Fn(&str)) {
    let began = Instant::now();
    let mut is_told = false;
    // Kept while it works: to open one may be to start the user's controlplane.
    let mut kept = None;
    loop {
        let why = match session(connection, network, &mut kept).await {
            Ok(()) => return,
            Err(why) => why,
        };
        let is_late = began.elapsed() >= SESSION_PATIENCE;
        if is_late && !is_told {
            is_told = true;
            late(&why);
        }
        tokio::time::sleep(until_asked_again(kept.is_some(), is_late)).await;
    }
}

/// How long until it is asked again. Only who answers is asked often, and not for ever.
fn until_asked_again(is_answered: bool, is_late: bool) -> Duration {
    if is_answered && !is_late {
        SESSION_INTERVAL
    } else {
        RETRY_INTERVAL
    }
}

/// Whether it has one; else why not. Zones of a network are listed while its dataplane is connected. The connection is
/// `kept` unless it failed.
async fn session(connection: &Connection, network: &str, kept: &mut Option<Client>) -> Result<(), String> {
    let client = match kept.take() {
        Some(client) => client,
        None => connection.open().await.map_err(|failure| failure.to_string())?,
    };
    let request = v1::ListZonesRequest {
        network: network.to_owned(),
    };
    match client.dns().list_zones(unary(request)).await {
        Ok(_) => Ok(()),
        Err(status) => {
            // What a controlplane refuses, it gives reasons for.
            if !status.details().is_empty() {
                *kept = Some(client);
            }
            Err(describe(&status))
        }
    }
}

/// How `vnetctl` is to be called so that it reaches the same controlplane.
pub fn command_line(connection: &Connection) -> String {
    match &connection.named {
        Some(Server::Unix(path)) => format!("vnetctl --server unix://{}", path.display()),
        None => "vnetctl".to_owned(),
    }
}

/// A name for a dataplane that nobody else has, so that its VMs can be told by it.
///
/// # Errors
/// When the system has no randomness.
pub fn dataplane_name(what: &str) -> Result<String, Failure> {
    let random = getrandom::u32().map_err(|e| Failure::Failed(format!("no randomness to be had: {e}")))?;
    Ok(format!("{what}-{}-{random:08x}", std::process::id()))
}

/// Lines to stderr of acts that need no terminal; the others are given back.
pub fn say(acts: Vec<Act>) -> Vec<Act> {
    let (lines, rest): (Vec<Act>, Vec<Act>) = acts.into_iter().partition(|act| matches!(act, Act::Say(_)));
    for line in lines {
        if let Act::Say(line) = line {
            crate::output::say(line);
        }
    }
    rest
}

/// Changes on the way to the one who shows them; more make the watch wait, and then tell of a gap.
const SEEN_MAX: usize = 64;
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// How often it is asked whether a dataplane has its session, and after how long it is told that it has none yet.
const SESSION_INTERVAL: Duration = Duration::from_millis(20);
const SESSION_PATIENCE: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::net::{UnixListener, UnixStream};
    use tonic::Status;
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;
    use crate::cmd::tests::scripted::Scripted;

    #[tokio::test]
    async fn a_session_is_waited_for_over_one_connection_until_that_fails() {
        let server = Scripted::start();
        let Some(Server::Unix(to)) = server.connection().named else {
            panic!()
        };
        let path = std::env::temp_dir().join(format!("vnetctl-has-session-{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let relay = tokio::spawn(async move {
            while let Ok((mut from, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let mut to = UnixStream::connect(&to).await.unwrap();
                tokio::spawn(async move { tokio::io::copy_bidirectional(&mut from, &mut to).await });
            }
        });
        let connection = Connection {
            named: Some(Server::Unix(path.clone())),
        };
        // What one costs; asked something, so that it was counted.
        let client = connection.open().await.unwrap();
        assert!(!client.answers().await);
        let each = connections.swap(0, Ordering::Relaxed);
        let method = "DnsService/ListZones";
        let details = ErrorDetails::with_error_info("UNAVAILABLE", "vnet", HashMap::<String, String>::new());
        for _ in 0..5 {
            let refused =
                Status::with_error_details(tonic::Code::Unavailable, "not connected", details.clone());
            server.refuse(method, refused);
        }
        server.refuse(method, Status::unavailable("broken pipe"));
        server.answer(method, &v1::ListZonesResponse::default());

        has_session(&connection, "one", |why| panic!("{why}")).await;

        let asked: Vec<v1::ListZonesRequest> = server.asked(method);
        assert_eq!(asked.len(), 7);
        assert!(asked.iter().all(|asked| asked.network == "one"));
        let opened = connections.load(Ordering::Relaxed);
        assert_eq!(opened, 2 * each, "once, and once more when that failed");
        relay.abort();
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn who_does_not_answer_or_takes_long_is_asked_seldom() {
        assert_eq!(until_asked_again(true, false), SESSION_INTERVAL);
        for (is_answered, is_late) in [(true, true), (false, false), (false, true)] {
            assert_eq!(until_asked_again(is_answered, is_late), RETRY_INTERVAL);
        }
    }

    #[test]
    fn the_end_of_a_question_is_passed_on_though_its_vm_went_first() {
        let change = |vm: &str, change: v1::PendingChange| v1::WatchPendingResponse {
            change: change.into(),
            request: Some(v1::PendingRequest {
                id: "01ab".to_owned(),
                vm: vm.to_owned(),
                ..Default::default()
            }),
        };
        let ours = HashMap::from([("web".to_owned(), true), ("other".to_owned(), false)]);
        let (added, removed) = (v1::PendingChange::Added, v1::PendingChange::Removed);

        assert_eq!(known(&ours, &change("gone", removed)), Some(true));
        assert_eq!(
            known(&ours, &change("gone", added)),
            None,
            "it is asked whose it is"
        );
        assert_eq!(known(&ours, &change("web", removed)), Some(true));
        assert_eq!(known(&ours, &change("other", removed)), Some(false));
    }
}
