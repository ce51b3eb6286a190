// Search in pages that are opened as files: browsers start no workers there, so an iframe runs the worker's script.
(() => {
  function post(message) {
    parent.postMessage(message, "*");
  }

  // What the script imports is loaded in order.
  function load(...addresses) {
    return addresses.reduce((before, address) => before.then(() => new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = address;
      script.onload = done;
      script.onerror = failed;
      document.body.appendChild(script);
    })), Promise.resolve());
  }

  class FrameWorker extends EventTarget {
    constructor(address) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      const { contentWindow: inside, contentDocument: page } = this.frame;
      this.receive = (event) => {
        if (event.source !== inside) return;
        event.stopImmediatePropagation();
        const copy = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(copy);
        if (this.onmessage) this.onmessage(copy);
      };
      addEventListener("message", this.receive);
      const end = "</" + "script>";
      page.open();
      page.write(`<html><body><script>postMessage = ${post}; importScripts = ${load};${end}<script src="${address}">${end}`);
      page.close();
      this.ready = new Promise((done) => { inside.onload = done; });
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      removeEventListener("message", this.receive);
      this.frame.remove();
    }
  }

  if (location.protocol === "file:") window.Worker = FrameWorker;
})();
