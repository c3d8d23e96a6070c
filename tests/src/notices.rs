//! Who listens for the notifications of `gvproxy -notification`.

use std::io::Read as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::Value;

/// What a listener at this path is told from now on, an object a connection; null where it was none.
///
/// # Panics
/// When the path cannot be listened at.
pub fn listen(path: &Path) -> Arc<Mutex<Vec<Value>>> {
    let listener = UnixListener::bind(path).expect("a path of its own");
    let told = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&told);
    thread::spawn(move || {
        for socket in listener.incoming() {
            let mut line = String::new();
            if socket.is_ok_and(|mut socket| socket.read_to_string(&mut line).is_ok()) {
                into.lock()
                    .expect("nobody panics")
                    .push(serde_json::from_str(&line).unwrap_or(Value::Null));
            }
        }
    });
    told
}
