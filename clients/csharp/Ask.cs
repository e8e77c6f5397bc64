// Put one message to a model behind an OpenAI-compatible service and print its JSON answer.
//
//   dotnet run -- http://127.0.0.1:5273/v1 support-desk "I lost my card" [--stream] [--system TEXT]
//
// Needs the .NET SDK 8 or later and no package. A key, where the service wants one, comes from OPENAI_API_KEY.
// Written in C# 7, so that Mono's compiler takes it too: that is how the course's tests build it.
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Net.Http;
using System.Net.Http.Headers;
using System.Text;
using System.Text.Json;
using System.Threading.Tasks;

class Trouble : Exception
{
    public Trouble(string words) : base(words) { }
}

static class Program
{
    static int Main(string[] arguments)
    {
        try
        {
            Run(arguments).GetAwaiter().GetResult();
            return 0;
        }
        catch (Trouble trouble)
        {
            Console.Error.WriteLine(trouble.Message);
            return 1;
        }
    }

    static async Task Run(string[] arguments)
    {
        var rest = arguments.ToList();
        var stream = rest.Remove("--stream");
        var system = "Answer with JSON.";
        var at = rest.IndexOf("--system");
        if (at >= 0 && at + 1 < rest.Count)
        {
            system = rest[at + 1];
            rest.RemoveRange(at, 2);
        }
        if (rest.Count != 3)
            throw new Trouble("Usage: dotnet run -- BASE_URL MODEL \"MESSAGE\" [--stream] [--system TEXT]");

        var reply = await Ask(rest[0], rest[1], system, rest[2], stream);
        try
        {
            using (JsonDocument.Parse(reply)) { }
        }
        catch (JsonException error)
        {
            throw new Trouble($"The reply is not JSON ({error.Message}): check that this model was trained for the task.");
        }
        if (!stream)
            Console.WriteLine(reply);
    }

    static async Task<string> Ask(string baseUrl, string model, string system, string message, bool stream)
    {
        var body = JsonSerializer.Serialize(new Dictionary<string, object>
        {
            ["model"] = model,
            ["messages"] = new[]
            {
                new Dictionary<string, string> { ["role"] = "system", ["content"] = system },
                new Dictionary<string, string> { ["role"] = "user", ["content"] = message },
            },
            ["temperature"] = 0,
            ["max_tokens"] = 256,
            ["stream"] = stream,
        });
        using (var client = new HttpClient { Timeout = TimeSpan.FromSeconds(60) })
        using (var response = await Send(client, baseUrl, body))
        {
            if (!response.IsSuccessStatusCode)
            {
                var words = await response.Content.ReadAsStringAsync();
                throw new Trouble(
                    $"The service refused the request with HTTP status {(int)response.StatusCode} " +
                    $"({words.Substring(0, Math.Min(200, words.Length))}): check that it has the model {model}.");
            }
            try
            {
                return stream ? await ReadPieces(response) : ReadContent(await response.Content.ReadAsStringAsync(), "message");
            }
            catch (Exception error) when (error is JsonException || error is KeyNotFoundException
                || error is InvalidOperationException || error is HttpRequestException || error is IOException)
            {
                throw new Trouble($"The service's answer cannot be read ({error.Message}): check that it is OpenAI-compatible.");
            }
        }
    }

    static async Task<HttpResponseMessage> Send(HttpClient client, string baseUrl, string body)
    {
        var key = Environment.GetEnvironmentVariable("OPENAI_API_KEY");
        var address = baseUrl.TrimEnd('/') + "/chat/completions";
        try
        {
            var request = new HttpRequestMessage(HttpMethod.Post, address);
            request.Headers.Authorization = new AuthenticationHeaderValue("Bearer", string.IsNullOrEmpty(key) ? "none-needed" : key);
            request.Content = new StringContent(body, Encoding.UTF8, "application/json");
            return await client.SendAsync(request, HttpCompletionOption.ResponseHeadersRead);
        }
        catch (Exception error) when (error is HttpRequestException || error is TaskCanceledException || error is UriFormatException
            || error is InvalidOperationException)
        {
            throw new Trouble($"Nothing answers at {baseUrl} ({error.Message}): start the service, or check the address.");
        }
    }

    // Server-sent events: lines "data: {…}", the last one "data: [DONE]".
    static async Task<string> ReadPieces(HttpResponseMessage response)
    {
        var reply = new StringBuilder();
        using (var reader = new StreamReader(await response.Content.ReadAsStreamAsync(), Encoding.UTF8))
        {
            string line;
            while ((line = await reader.ReadLineAsync()) != null)
            {
                var data = line.StartsWith("data:") ? line.Substring(5).Trim() : "[DONE]";
                if (data == "[DONE]")
                    continue;
                var piece = ReadContent(data, "delta");
                reply.Append(piece);
                Console.Write(piece);
                Console.Out.Flush();
            }
        }
        Console.WriteLine();
        return reply.ToString();
    }

    // The text of a whole completion (its "message") or of one piece of a stream (its "delta"); a piece may have none.
    static string ReadContent(string json, string part)
    {
        using (var document = JsonDocument.Parse(json))
        {
            var choices = document.RootElement.GetProperty("choices");
            if (choices.GetArrayLength() == 0 || !choices[0].GetProperty(part).TryGetProperty("content", out var content))
                return "";
            return content.ValueKind == JsonValueKind.String ? content.GetString() : "";
        }
    }
}
