//! A controlplane that answers from a script: each method's answers in turn, and a record of what was
//! asked. Real gRPC over a real socket, so that the client is what users have.

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use bytes::{Buf as _, BufMut as _};
use prost::Message;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, NamedService, ServerStreamingService, UnaryService};
use tonic::{Request, Response, Status};

use crate::client::{Connection, Server};

type Answers = Vec<Result<Vec<u8>, Status>>;
/// A method's path, and the request's bytes.
type Asked = (String, Vec<u8>);

#[derive(Clone, Default)]
struct Script {
    answers: Arc<Mutex<HashMap<String, Answers>>>,
    /// How long a method's answers take.
    takes: Arc<Mutex<HashMap<String, Duration>>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

/// The server. It ends when this is dropped.
pub(crate) struct Scripted {
    script: Script,
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Scripted {
    pub(crate) fn start() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "vnetctl-{}-{}.sock",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        let _ = std::fs::remove_file(&path);
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let script = Script::default();
        let server = tonic::transport::Server::builder()
            .add_service(Pending(script.clone()))
            .add_service(Grants(script.clone()))
            .add_service(Vms(script.clone()))
            .add_service(Flows(script.clone()))
            .add_service(Events(script.clone()))
            .add_service(Policies(script.clone()))
            .add_service(Forwards(script.clone()))
            .add_service(Dns(script.clone()));
        let task = tokio::spawn(async move {
            server
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
                .unwrap();
        });
        Self { script, path, task }
    }

    pub(crate) fn connection(&self) -> Connection {
        Connection {
            named: Some(Server::Unix(self.path.clone())),
        }
    }

    /// One more answer of a method, as `PendingService/ListPending`. All of a watch are sent at once.
    pub(crate) fn answer(&self, method: &str, message: &impl Message) {
        self.push(method, Ok(message.encode_to_vec()));
    }

    /// From now on the answers of a method take this long.
    pub(crate) fn takes(&self, method: &str, time: Duration) {
        let path = format!("/vnet.v1.{method}");
        self.script.takes.lock().unwrap().insert(path, time);
    }

    pub(crate) fn refuse(&self, method: &str, status: Status) {
        self.push(method, Err(status));
    }

    /// The requests that a method was asked.
    pub(crate) fn asked<M: Message + Default>(&self, method: &str) -> Vec<M> {
        let asked = self.script.asked.lock().unwrap();
        let of_method = asked
            .iter()
            .filter(|(path, _)| *path == format!("/vnet.v1.{method}"));
        of_method
            .map(|(_, bytes)| M::decode(bytes.as_slice()).unwrap())
            .collect()
    }

    fn push(&self, method: &str, answer: Result<Vec<u8>, Status>) {
        self.script
            .answers
            .lock()
            .unwrap()
            .entry(format!("/vnet.v1.{method}"))
            .or_default()
            .push(answer);
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Script {
    fn next(&self, path: &str, request: Vec<u8>) -> Result<Vec<u8>, Status> {
        self.asked.lock().unwrap().push((path.to_owned(), request));
        match self.answers.lock().unwrap().get_mut(path) {
            Some(answers) if !answers.is_empty() => answers.remove(0),
            _ => Err(Status::unimplemented(format!("{path} is not in the script"))),
        }
    }

    fn all(&self, path: &str, request: Vec<u8>) -> Answers {
        self.asked.lock().unwrap().push((path.to_owned(), request));
        self.answers.lock().unwrap().remove(path).unwrap_or_default()
    }
}

macro_rules! services {
    ($($name:ident = $full:literal;)*) => {$(
        #[derive(Clone)]
        struct $name(Script);

        impl NamedService for $name {
            const NAME: &'static str = $full;
        }

        impl Service<http::Request<Body>> for $name {
            type Response = http::Response<Body>;
            type Error = Infallible;
            type Future = BoxFuture<Self::Response, Infallible>;

            fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, request: http::Request<Body>) -> Self::Future {
                let method = Method { script: self.0.clone(), path: request.uri().path().to_owned() };
                Box::pin(async move {
                    let mut grpc = Grpc::new(RawCodec);
                    Ok(if method.path.contains("/Watch") {
                        grpc.server_streaming(method, request).await
                    } else {
                        grpc.unary(method, request).await
                    })
                })
            }
        }
    )*};
}

services! {
    Pending = "vnet.v1.PendingService";
    Grants = "vnet.v1.GrantService";
    Vms = "vnet.v1.VmService";
    Flows = "vnet.v1.FlowService";
    Events = "vnet.v1.EventService";
    Policies = "vnet.v1.PolicyService";
    Forwards = "vnet.v1.ForwardService";
    Dns = "vnet.v1.DnsService";
}

struct Method {
    script: Script,
    path: String,
}

impl UnaryService<Vec<u8>> for Method {
    type Response = Vec<u8>;
    type Future = BoxFuture<Response<Vec<u8>>, Status>;

    fn call(&mut self, request: Request<Vec<u8>>) -> Self::Future {
        let answer = self.script.next(&self.path, request.into_inner());
        let time = self.script.takes.lock().unwrap().get(&self.path).copied();
        Box::pin(async move {
            if let Some(time) = time {
                tokio::time::sleep(time).await;
            }
            answer.map(Response::new)
        })
    }
}

impl ServerStreamingService<Vec<u8>> for Method {
    type Response = Vec<u8>;
    type ResponseStream = tokio_stream::Iter<std::vec::IntoIter<Result<Vec<u8>, Status>>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Vec<u8>>) -> Self::Future {
        let answers = self.script.all(&self.path, request.into_inner());
        Box::pin(async move { Ok(Response::new(tokio_stream::iter(answers))) })
    }
}

/// Messages as their bytes.
#[derive(Clone, Copy, Default)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for RawCodec {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining()).to_vec()))
    }
}
