//! A guest whose sshd wants more of us than it was asked for.

use std::sync::atomic::AtomicBool;

use russh::keys::decode_secret_key;
use russh::server::{self, Auth, Handle};

use super::*;

/// An sshd that lets everybody in.
#[derive(Default)]
struct Hostile {
    sessions: Arc<Mutex<Vec<Handle>>>,
    is_in: Arc<AtomicBool>,
}

struct Door(Arc<AtomicBool>);

impl server::Handler for Door {
    type Error = russh::Error;

    async fn auth_publickey(
        &mut self,
        _: &str,
        _: server::VerifiedPublicKey<'_>,
    ) -> Result<Auth, Self::Error> {
        Ok(Auth::Accept)
    }

    async fn auth_succeeded(&mut self, _: &mut server::Session) -> Result<(), Self::Error> {
        self.0.store(true, Ordering::SeqCst);
        Ok(())
    }
}

#[tonic::async_trait]
impl Tunnels for Hostile {
    async fn open(&self, _: SocketAddr) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let config = server::Config {
            keys: vec![decode_secret_key(KEY, None).unwrap()],
            ..server::Config::default()
        };
        let door = Door(Arc::clone(&self.is_in));
        let sessions = Arc::clone(&self.sessions);
        // It begins when it has heard the client, who has to have its stream for that.
        tokio::spawn(async move {
            let session = server::run_stream(Arc::new(config), theirs, door).await.unwrap();
            sessions.lock().unwrap().push(session.handle());
        });
        Ok(ours)
    }
}

#[tokio::test]
async fn no_channel_that_a_guest_opens_is_taken() {
    let directory = Directory::new();
    let hostile = Arc::new(Hostile::default());
    let forward = directory.forward();
    let bound = Forward::bind(&forward, TARGET.parse().unwrap(), hostile.clone(), quick()).unwrap();
    let running = tokio::spawn(bound.run());
    eventually("it is let in", || hostile.is_in.load(Ordering::SeqCst)).await;
    let session = hostile.sessions.lock().unwrap().pop().unwrap();

    for _ in 0..3 {
        let opened = [
            session.channel_open_agent().await,
            session.channel_open_session().await,
            session
                .channel_open_direct_tcpip("127.0.0.1", 22, "127.0.0.1", 1)
                .await,
            session.channel_open_direct_streamlocal("/run/host.sock").await,
            session
                .channel_open_forwarded_tcpip("127.0.0.1", 22, "127.0.0.1", 1)
                .await,
            session.channel_open_forwarded_streamlocal("/run/host.sock").await,
            session.channel_open_x11("127.0.0.1", 1).await,
        ];
        for (kind, opened) in opened.iter().enumerate() {
            assert!(
                matches!(opened, Err(russh::Error::ChannelOpenFailure(_))),
                "{kind}: {opened:?}"
            );
        }
    }
    assert!(!running.is_finished());
    running.abort();
}
